"""The steps of one training, in this process or shared among several."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from gradexp.data.dataset import ImageData
from gradexp.data.loader import Loader, TrainingStream
from gradexp.engine.callbacks import Checkpointer, ProgressLine
from gradexp.engine.hardware import Hardware
from gradexp.engine.processes import Part, train_together
from gradexp.engine.run import Run
from gradexp.training.classifier import Classifier
from gradexp.training.dropout import dropout_after


@dataclass(frozen=True)
class Training:
    """Everything that exists before the first step."""

    run: Run
    hardware: Hardware
    data: ImageData
    loader: Loader
    module: Classifier
    checkpointer: Checkpointer
    progress: ProgressLine

    def fit(self, logger: Any, *callbacks: lightning.Callback, steps: int | None = None) -> int:
        """Does this process's part of the steps, from the last checkpoint if there is one. Returns the number of steps done.

        steps: None for all of the training; a probe does a few.
        """
        hardware, module = self.hardware, self.module
        world = hardware.together if hardware.is_part else 1
        stream = TrainingStream(self.loader, steps or module.total_steps, rank=hardware.rank, world=world)
        with dropout_after(module.student, self.run.config["method"].get("dropout"), self.loader.example):
            fit(module, stream, hardware, logger, self.checkpointer, self.progress, *callbacks)
        return int(module.global_step)

    def fit_in_processes(self, part: Part) -> int:
        """Starts processes that do the steps by calling `part`, and loads the result. Returns the number of steps done."""
        run, hardware, checkpointer = self.run, self.hardware, self.checkpointer
        if checkpointer.usable():
            checkpointer.load_state_dict(load_checkpoint(checkpointer.path)["callbacks"]["Checkpointer"])
        train_together(run, part, devices=hardware.devices, nodes=hardware.num_nodes)
        state = load_checkpoint(checkpointer.path)
        self.module.load_state_dict(state["state_dict"])
        self.module.on_load_checkpoint(state)
        self.progress.load_outcome(state["callbacks"]["ProgressLine"])
        checkpointer.earlier["cpu"] = state["callbacks"]["Checkpointer"]["cpu"]  # of all processes
        return int(state["global_step"])


def load_checkpoint(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def fit(
    module: Classifier,
    stream: TrainingStream,
    hardware: Hardware,
    logger: Any,
    checkpointer: Checkpointer,
    *callbacks: lightning.Callback,
) -> None:
    """Trains on every batch of the stream, from the last checkpoint if there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers and of a log interval, neither of which is used here
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            **hardware.trainer_options(),
            max_epochs=1,
            logger=logger or False,
            callbacks=[checkpointer, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        resume = checkpointer.path if checkpointer.usable() else None
        try:
            trainer.fit(module, stream, ckpt_path=resume, weights_only=True)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes it exit code 1
                raise KeyboardInterrupt from None
            raise
    hardware.place(module.student)  # Lightning leaves it on the CPU
