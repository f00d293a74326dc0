"""The steps of one training, in this process or shared among several, on one machine or more: trainer=ddp.

The run (its lock, upstream runs and record) stays in the process that the user started; only the training steps are shared.
The result comes back as the checkpoint that the first of the processes writes last.

    python -m gradexp.engine.fit PART CONFIG DEVICES NODES HOST:PORT

starts the processes of one machine of several; srun runs it on each.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pkgutil import resolve_name
from typing import Any

import lightning
import torch

from gradexp.base.errors import UserError
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Loader, TrainingStream
from gradexp.engine.callbacks import SIGNALS, Checkpointer, ProgressLine, call_handler
from gradexp.engine.exits import keeping_handlers
from gradexp.engine.hardware import Hardware
from gradexp.engine.run import Run
from gradexp.training.classifier import Classifier
from gradexp.training.dropout import dropout_after

EXITED = 128  # exit codes of processes that were stopped are this plus the number of the signal, as a shell reports them

Part = Callable[[str], None]  # what each process does, called with the run's config as JSON


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

    def fit(self, logger: Any) -> int:
        """Does this process's part of the steps, from the last checkpoint if there is one. Returns the number of steps done."""
        hardware, module = self.hardware, self.module
        world = hardware.together if hardware.is_part else 1
        stream = TrainingStream(self.loader, module.total_steps, rank=hardware.rank, world=world)
        with dropout_after(module.student, self.run.config["method"].get("dropout"), self.loader.example):
            fit(module, stream, hardware, logger, self.checkpointer, self.progress)
        return module.steps_done

    def fit_in_processes(self, part: Part) -> int:
        """Starts processes that do the steps by calling `part`, and loads the result. Returns the number of steps done.

        Raises Stopped after a signal, UserError where a process failed.
        """
        run, hardware, checkpointer = self.run, self.hardware, self.checkpointer
        if checkpointer.usable():
            kept = torch.load(checkpointer.path, weights_only=True, map_location="cpu")
            checkpointer.load_state_dict(kept["callbacks"]["Checkpointer"])
        text = json.dumps(run.config | {"paths": {name: str(folder) for name, folder in asdict(run.paths).items()}})
        while True:
            with keeping_handlers(SIGNALS) as before:
                if (nodes := hardware.num_nodes) == 1:
                    number = launch(part, text, hardware.devices)
                else:
                    number = _launch_everywhere(part, text, hardware.devices, nodes)
            if number is None:
                break
            call_handler(number, before[number], run.checkpoint)
        state = torch.load(checkpointer.path, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["state_dict"])
        self.module.on_load_checkpoint(state)
        self.progress.load_outcome(state["callbacks"]["ProgressLine"])
        checkpointer.earlier["cpu"] = state["callbacks"]["Checkpointer"]["cpu"]  # of all processes
        return self.module.ended_at or int(state["global_step"])


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
            with keeping_handlers(SIGNALS) as before:
                checkpointer.notice_signals(before)
                trainer.fit(module, stream, ckpt_path=resume, weights_only=True)
                checkpointer.after_training(trainer)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning makes it exit code 1
                raise KeyboardInterrupt from None
            raise
    hardware.place(module.student)  # Lightning leaves it on the CPU


def launch(part: Part, text: str, devices: int, nodes: int = 1, endpoint: str = "localhost:0") -> int | None:
    """Starts this machine's processes and waits for them. A signal is passed on to all of them.

    Returns None where they finished, or the signal that stopped them. Raises UserError where one failed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns when every parameter is used
    logging.disable(logging.ERROR)  # torch's launcher warns of processes that end; these print their own errors
    handled = [signal.Signals(number).name for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    with tempfile.TemporaryDirectory(prefix="gradexp-") as logs:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=devices,
            run_id="gradexp",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint,
            max_restarts=0,
            start_method="spawn",  # a server that forks them would end at a signal to the group, and their exit codes with it
            signals_to_handle=",".join(handled),  # after one, processes have 30 s to write their checkpoint
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, part)(text)
        except SignalException as error:
            return int(error.sigval)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items())
            code = failure.exitcode
            number = code - EXITED if code > EXITED else -code
            if number in SIGNALS:
                return int(number)
            raise UserError(
                f"process {rank} of the training was killed by {signal.Signals(-code).name}; the same command resumes from the "
                f"last checkpoint"
                if code < 0
                else f"process {rank} of the training ended with exit code {code}; its message is above"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
    return None


def _launch_everywhere(part: Part, text: str, devices: int, nodes: int) -> int | None:
    """Calls `launch` on every machine of the SLURM job."""
    hosts = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    host = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 20000  # jobs that share a machine rarely get the same port
    step = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    words = [f"{part.__module__}:{part.__name__}", text, str(devices), str(nodes), f"{host}:{port}"]
    caught, processes = list[int](), list[subprocess.Popen[bytes]]()

    def forward(number: int, _: Any) -> None:
        caught.append(number)
        for process in processes:  # srun takes one SIGINT for a question and ends at the second, without a checkpoint
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    processes.append(subprocess.Popen([*step, sys.executable, "-m", "gradexp.engine.fit", *words]))
    if caught:  # while srun was started
        processes[0].send_signal(signal.SIGTERM)
    code = processes[0].wait()
    if caught:
        return caught[0]
    if code - EXITED in SIGNALS:  # SLURM signalled the step itself
        return code - EXITED
    if code:
        raise UserError(f"srun ended with exit code {code}; the message of the process that failed is above")
    return None


if __name__ == "__main__":
    name, given, devices, nodes, endpoint = sys.argv[1:]
    number = launch(resolve_name(name), given, int(devices), int(nodes), endpoint)
    sys.exit(0 if number is None else EXITED + number)
