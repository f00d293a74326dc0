"""Figure 2.1: one-dimensional students. Matching slopes at a few points does what input noise at these points does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp.base.ranges import Count, Positive
from gradexp.data.loader import Batch
from gradexp.engine.assemble import make_hardware, make_model
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Task, Upstream
from gradexp.gradients import input_gradient
from gradexp.terms import Activations, Jacobian, Step, Term
from gradexp.terms.targets import Targets

GRID = 241  # points of the curves


@dataclass(kw_only=True)
class Illustration(Task):
    """Fits a teacher to a wave, and students to it at `points`: by values, by values under noise, by values and slopes.

    Metrics: `rms/STUDENT`, root mean square distance to the teacher on the interval. Arrays: curves, points, slopes there.
    sigma: standard deviation of the noise; slopes have weight sigma² (Proposition 1). noisy_copies: of each point, drawn anew
    in every step. steps, lr: of Adam with a cosine schedule, for every network. Runs on the CPU.
    """

    interval: Sequence[float]
    points: Sequence[float]
    sigma: Positive
    noisy_copies: Count
    steps: Count
    lr: Positive

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        hardware = make_hardware(run.config | {"trainer": run.config["trainer"] | {"accelerator": "cpu"}})
        from lightning import seed_everything  # takes seconds, and make plan does without it

        seed_everything(run.config["seed"], verbose=False)
        start, end = self.interval
        x, points = torch.linspace(start, end, GRID), torch.tensor(self.points)
        teacher, at_points = self.teacher(run, x), _batch(points)

        def noisy() -> Batch:
            copies = points.repeat(self.noisy_copies)
            return _batch(copies + self.sigma * torch.randn(copies.shape))

        values = Activations(weight=1, reduction="sum")
        slopes = Jacobian(weight=self.sigma**2, reduction="sum", target="label", student_bn="batch")
        students = {
            "activations": self.student(run, teacher, [values], lambda: at_points),
            "noise": self.student(run, teacher, [values], noisy),
            "jacobian": self.student(run, teacher, [values, slopes], lambda: at_points),
        }
        curves = {"teacher": _curve(teacher, x)} | {name: _curve(student, x) for name, student in students.items()}
        metrics: dict[str, Any] = {f"rms/{name}": _rms(curves[name] - curves["teacher"]) for name in students}
        teacher_slopes = input_gradient(teacher, at_points.images, at_points.labels).flatten()
        drawn = {"x": x, **curves, "points": points, "values": _curve(teacher, points), "slopes": teacher_slopes}
        arrays = {name: array.numpy().astype(np.float32) for name, array in drawn.items()}
        return Result(metrics, facts=hardware.facts(mixed=False), arrays=arrays)

    def teacher(self, run: Run, x: Tensor) -> nn.Module:
        """A network fitted to sin(2x) + 0.4x on the interval."""
        teacher, batch = make_model(run.config), _batch(x)
        wave = torch.sin(2 * x) + 0.4 * x
        self.fit(teacher, lambda: (teacher(batch.images)[:, 0] - wave).square().mean())
        return teacher

    def student(self, run: Run, teacher: nn.Module, terms: Sequence[Term], batches: Callable[[], Batch]) -> nn.Module:
        """A network fitted to the weighted sum of the terms; every student starts from the same weights."""
        torch.manual_seed(run.config["seed"] + 1)
        student, targets = make_model(run.config), Targets(teacher, with_gradient=True)

        def loss() -> Tensor:
            step = Step(batches(), student, targets, differentiable_input=True)
            return torch.stack([term.weight * term(step) for term in terms]).sum()

        self.fit(student, loss)
        return student

    def fit(self, network: nn.Module, loss: Callable[[], Tensor]) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _batch(x: Tensor) -> Batch:
    """Points (N,) as images (N, 1, 1, 1), all of class 0."""
    rows = torch.arange(len(x))
    return Batch(x.view(-1, 1, 1, 1), torch.zeros_like(rows), rows, torch.zeros_like(rows))


def _curve(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(_batch(x).images)[:, 0]


def _rms(values: Tensor) -> float:
    return round(float(values.square().mean().sqrt()), 6)
