"""Distillation (Chapters 2 and 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradexp import gradients
from gradexp.terms import Step
from gradexp.training.classifier import Classifier


class Distillation(Classifier):
    """A Classifier with a teacher; also records the mean angle in degrees between input-gradients, `train/angle` (Figure 4.1).

    The gradients are those that terms match. angle: the output whose gradients are compared where no term matches any, at the
    cost of further backward passes; None for no angle then.
    """

    def __init__(self, *args: Any, angle: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.angle = angle
        self.needs_input_gradient |= angle is not None

    def observe(self, step: Step) -> dict[str, Tensor]:
        angle = self._angle(step)
        return super().observe(step) | ({} if angle is None else {"train/angle": angle})

    def _angle(self, step: Step) -> Tensor | None:
        matched = step.angle()
        if matched is not None or self.angle is None:
            return matched
        with torch.no_grad():
            student = step.student_input_gradient(self.angle, "batch")
        return gradients.angle(student, step.teacher_input_gradient(self.angle)).mean()
