"""Training a student with a teacher's help (Chapters 2 and 4)."""

from __future__ import annotations

from torch import Tensor

from gradexp.terms import Step
from gradexp.training.classifier import Classifier


class Distillation(Classifier):
    """A Classifier whose terms match a teacher; where they match gradients, the angle between these is recorded."""

    def observe(self, step: Step) -> dict[str, Tensor]:
        angle = step.angle()
        return {} if angle is None else {"train/angle": angle}
