"""Length of a training, optimizer and learning-rate schedule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Fraction, NonNegative

Schedule = Callable[[float], float]


class _Closure:
    """A computation of the loss, which counts how often an optimizer's step calls it."""

    calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        return torch.zeros(())


@dataclass(frozen=True)
class Optim:
    """Length of a training in passes over the training subset or in steps, batch size, optimizer, learning-rate schedule.

    optimizer: called with the parameters. schedule: progress in [0, 1) -> factor of the learning rate; None: it is constant.
    """

    batch_size: Count
    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Schedule | None
    passes: Count | None
    steps: Count | None

    def __post_init__(self) -> None:
        """Raises UserError for settings that the optimizer refuses, such as a negative learning rate."""
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)  # LBFGS stops where it is 0
        try:
            optimizer = self.optimizer([parameter])
            name, closure = type(optimizer).__name__, _Closure()
            try:
                inspect.signature(optimizer.step).bind(closure=closure)
            except TypeError:
                raise ValueError(f"{name}.step takes no `closure`, which computes the gradients") from None
            with suppress(AssertionError):  # capturable=true is for other devices
                optimizer.step(closure=closure)
                if closure.calls == 0:
                    raise ValueError(f"{name}.step does not call its closure, which computes the gradients")
                if closure.calls > 1:
                    raise ValueError(f"{name} evaluates the loss several times a step; choose another one")
        except (ValueError, RuntimeError) as error:  # SparseAdam refuses its gradients at the first step
            raise UserError(f"optim.optimizer: {error}") from None

    def total_steps(self, steps_per_pass: int) -> int:
        """Raises UserError unless exactly one of passes and steps is given."""
        if self.steps is not None and self.passes is None:
            return self.steps
        if self.passes is not None and self.steps is None:
            return self.passes * steps_per_pass
        raise UserError("state the length of training once: set optim.passes or optim.steps, and the other one to null")

    def build(self, parameters: Sequence[torch.nn.Parameter], total_steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        fused = {"fused": True} if "fused" in inspect.signature(self.optimizer).parameters else {}
        optimizer = self.optimizer(parameters, **fused)
        schedule = self.schedule or (lambda progress: 1.0)
        return optimizer, LambdaLR(optimizer, lambda step: schedule(step / total_steps))


def steps_down(progress: float, *, at: Sequence[Fraction], factor: NonNegative) -> float:
    """Step decay: 1, multiplied by `factor` at each fraction of the training in `at`."""
    return factor ** sum(progress >= point for point in at)


def one_cycle(progress: float, *, warmup: Fraction, start: NonNegative, end: NonNegative) -> float:
    """Cosine from `start` up to 1 during the fraction `warmup`, then cosine down to `end` (Smith and Topin, 2018)."""
    if progress < warmup:
        return _cosine(start, 1.0, progress / warmup)
    return _cosine(1.0, end, (progress - warmup) / (1 - warmup))


def _cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2
