"""The LightningModule of every training: the loss of a step is a weighted sum of terms."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import Batch, mix, send
from gradexp.layers import ranks
from gradexp.terms import Step, Term
from gradexp.terms.targets import Targets
from gradexp.training.optim import Optim

READ_EVERY = 1.0  # seconds between two reads of a GPU's means, each of which waits for it; a pass may be a single step


class PassSums(NamedTuple):
    """The sums of a finished pass over its steps, still on the device. counts: of steps; step: the number of the last one."""

    sums: dict[str, Tensor]
    counts: dict[str, int]
    step: int
    learning_rate: float  # NaN without a logger


class Classifier(lightning.LightningModule):
    """Trains `student` on the weighted sum of `terms`, in train mode; `targets` are those of a teacher, None without one.

    `curves` gains one value per quantity for every pass over the data: its mean over the steps of the pass. A training whose
    mean loss is not finite ends there, with `diverged` set and `steps_done` the steps until then. A GPU's values are read about
    once a second, and what it did between the divergence and the next reading is not counted.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Mapping[str, Term],
        optim: Optim,
        *,
        steps_per_pass: int,
        seed: int,
        targets: Targets | None = None,
    ) -> None:
        super().__init__()
        self.student, self.terms, self.optim, self.targets = student, nn.ModuleDict(terms), optim, targets
        self.steps_per_pass, self.seed = steps_per_pass, seed
        self.needs_input_gradient = any(term.needs_input_gradient for term in terms.values())
        self.student_layers = tuple(dict.fromkeys(layer for term in terms.values() for layer in term.student_layers))
        self.student_biases = tuple(dict.fromkeys(layer for term in terms.values() for layer in term.student_biases))
        self.full_precision = any(term.full_precision for term in terms.values())
        self.total_steps = optim.total_steps(steps_per_pass)
        self.curves: dict[str, list[float]] = {}
        self.diverged = False
        self.ended_at: int | None = None  # steps until the divergence
        self._finished: list[PassSums] = []  # passes whose means are not read yet
        self._read_at = time.monotonic()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._summed = 0

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.optim.build(list(self.student.parameters()), self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, _: int) -> Batch:
        """Leaves row and view on the CPU: reading them there again would wait for the device."""
        return batch._replace(images=send(batch.images, device), labels=send(batch.labels, device))

    def on_train_start(self) -> None:
        if self.diverged:  # before the checkpoint that was loaded
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Batch, number: int) -> None:
        torch.manual_seed(mix(self.seed, self.global_step))  # dropout draws the same after a resume

    def training_step(self, batch: Batch, _: int) -> Tensor:
        share = None if batch.share is None else ranks.Share(*batch.share)
        full = torch.autocast(batch.images.device.type, enabled=False) if self.full_precision else nullcontext()
        with ranks.sharing(share), full:
            return self._loss(batch)

    def _loss(self, batch: Batch) -> Tensor:
        step = Step(
            batch,
            self.student,
            self.targets,
            differentiable_input=self.needs_input_gradient,
            student_layers=self.student_layers,
            student_biases=self.student_biases,
        )
        parts = {name: self._weighted(name, term, step) for name, term in self.terms.items()}
        loss = torch.stack(list(parts.values())).sum()
        part = ranks.part(batch.images)  # this process's share of the batch: terms are means over its own images
        values = {f"train/loss/{name}": value for name, value in parts.items()} | {"train/loss": loss} | self.observe(step)
        self._add({name: value * part for name, value in values.items()})
        if self._summed == self.steps_per_pass or self.global_step + 1 == self.total_steps:
            self._end_pass()
        return loss * (part * ranks.world())  # the processes' gradients are averaged

    def _weighted(self, name: str, term: Any, step: Step) -> Tensor:
        try:
            value = term(step)
        except UserError as error:
            raise UserError(f"method.terms.{name}: {error}") from None
        if not isinstance(value, Tensor) or value.ndim:
            what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"method.terms.{name}: forward returned {what}, expected a scalar tensor, a mean over the batch")
        return term.weight * value

    def observe(self, step: Step) -> dict[str, Tensor]:
        """Scalars of a step, beside losses, that become curves; a step may lack some. Here: what the terms observed."""
        terms = (term for term in self.terms.values() if isinstance(term, Term))
        return {f"train/{name}": value for term in terms for name, value in term.observed.items()}

    def summary(self) -> dict[str, float]:
        """Metrics computed from the curves after the last step."""
        return {}

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._summed += 1

    def _end_pass(self) -> None:
        rate = self.trainer.optimizers[0].param_groups[0]["lr"] if self.logger else math.nan
        self._finished.append(PassSums(self._totals(), self._counts, self.global_step, rate))
        self._sums, self._counts, self._summed = {}, {}, 0
        is_last = self.global_step + 1 == self.total_steps
        if is_last or self._reads_at_once() or time.monotonic() - self._read_at >= READ_EVERY:
            self._read_means()

    def _reads_at_once(self) -> bool:
        """Whether a pass is read when it ends. Nothing waits for that on a CPU.

        Processes must stop together, and under trainer.strict a diverged training must always end with the same weights.
        """
        on_cpu = self._finished[-1].sums["train/loss"].device.type == "cpu"
        return on_cpu or ranks.world() > 1 or torch.are_deterministic_algorithms_enabled()

    def _read_means(self) -> None:
        """Moves the means of finished passes into the curves, up to the divergence."""
        sums = [value for each in self._finished for value in each.sums.values()]
        values = iter(torch.stack(sums).tolist() if sums else ())  # one wait for the device, not one for each quantity
        for each in self._finished:
            means = {name: next(values) / each.counts[name] for name in each.sums}
            for name, mean in means.items():
                self.curves.setdefault(name, []).append(float(f"{mean:.5g}"))
            self._show(means, each)
            if not math.isfinite(means["train/loss"]):
                self.diverged, self.ended_at = True, each.step + 1  # a result, not an error: the record's status is `diverged`
                self.trainer.should_stop = True
                break
        self._finished, self._read_at = [], time.monotonic()

    @property
    def steps_done(self) -> int:
        return self.global_step if self.ended_at is None else self.ended_at

    def _show(self, means: dict[str, float], finished: PassSums) -> None:
        """Logs the means; a logger that fails is dropped, since the record does not depend on it."""
        if self.logger is None:
            return
        try:
            self.logger.log_metrics(means | {"learning_rate": finished.learning_rate}, step=finished.step)
        except Exception as error:
            print(f"{type(self.logger).__name__} failed ({error}); going on without it", flush=True)
            self.trainer.loggers = []  # Lightning would call it once more at the end

    def _totals(self) -> dict[str, Tensor]:
        """The sums over all processes."""
        if not self._sums or ranks.world() == 1:
            return self._sums
        return dict(zip(self._sums, ranks.total(torch.stack(list(self._sums.values()))), strict=True))

    # What a resumed run needs beside parameters and optimizer.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._read_means()
        checkpoint["curves"], checkpoint["sums"], checkpoint["diverged"] = self.curves, self._totals(), self.diverged
        checkpoint["ended_at"] = self.ended_at
        checkpoint["counts"], checkpoint["summed"] = self._counts, self._summed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curves, self.diverged, sums = checkpoint["curves"], checkpoint.get("diverged", False), checkpoint["sums"]
        self.ended_at = checkpoint.get("ended_at")  # checkpoints before 2026-11-29 lack it
        self._sums = sums if ranks.first() else {name: torch.zeros_like(value) for name, value in sums.items()}
        self._counts, self._summed = checkpoint["counts"], checkpoint["summed"]
