"""How long and how fast a model is trained."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Fraction, NonNegative

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Optim:
    """passes over the training subset (or a number of steps), batch size, optimizer, learning-rate schedule.

    optimizer: makes one from parameters; schedule: progress in [0, 1) -> factor of the learning rate.
    """

    batch_size: Count
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Schedule
    passes: Count | None
    steps: Count | None

    def total_steps(self, steps_per_pass: int) -> int:
        if (self.passes is None) == (self.steps is None):
            raise UserError("state the length of training once: optim.passes or optim.steps, the other one null")
        total = self.steps if self.passes is None else self.passes * steps_per_pass
        assert total is not None
        return total

    def build(self, parameters: Sequence[torch.nn.Parameter], total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        fused = {"fused": True} if "fused" in inspect.signature(self.optimizer).parameters else {}
        optimizer = self.optimizer(parameters, **fused)
        return optimizer, LambdaLR(optimizer, lambda step: self.schedule(step / total_steps))


def steps_down(progress: float, *, at: Sequence[Fraction], factor: NonNegative) -> float:
    """1, then multiplied by `factor` at each fraction of the training in `at`."""
    return factor ** sum(progress >= point for point in at)


def one_cycle(progress: float, *, warmup: Fraction, start: NonNegative, end: NonNegative) -> float:
    """Cosine from `start` up to 1 during the fraction `warmup`, then cosine down to `end` (Smith and Topin, 2018)."""
    if progress < warmup:
        return _cosine(start, 1.0, progress / warmup)
    return _cosine(1.0, end, (progress - warmup) / (1 - warmup))


def _cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2
