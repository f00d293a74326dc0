"""One training step's values, computed when a term first asks for them."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch


class Targets(Protocol):
    """What a step asks of its teacher."""

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W), or (B, K, C, H, W) for `all`."""


class Step:
    """Images, labels, student and teacher of one step; terms share its forwards and gradients.

    differentiable_input: whether some term needs the student's input-gradient.
    """

    def __init__(
        self, batch: Batch, student: nn.Module, teacher: Targets | None = None, *, differentiable_input: bool = False
    ) -> None:
        self.batch, self.student, self.teacher = batch, student, teacher
        self.images = batch.images.detach().requires_grad_() if differentiable_input else batch.images
        self.labels = batch.labels
        self._student_gradients: dict[tuple[str, str], Tensor] = {}
        self._teacher_gradients: dict[str, Tensor] = {}

    @cached_property
    def student_logits(self) -> Tensor:
        """(B, K), in the student's present mode."""
        return self.student(self.images)

    @cached_property
    def _running_logits(self) -> Tensor:
        """The student's logits with running statistics, as at test time."""
        training = self.student.training
        self.student.eval()
        try:
            return self.student(self.images)
        finally:
            self.student.train(training)

    @cached_property
    def teacher_logits(self) -> Tensor:
        """(B, K), constant."""
        return self._teacher.logits(self.batch)

    def student_input_gradient(self, target: str, student_bn: str) -> Tensor:
        """(B, C, H, W), differentiable. student_bn: `batch` or `running` statistics in batch normalisation."""
        key = (target, student_bn)
        if key not in self._student_gradients:
            logits = self.student_logits if student_bn == "batch" else self._running_logits
            self._student_gradients[key] = gradients.gradient_of(
                logits, self.images, self.labels, target=target, differentiable=torch.is_grad_enabled()
            )
        return self._student_gradients[key]

    def student_hessian_trace(self, sigma: float, target: str) -> Tensor:
        """(B,), one-sample Taylor estimate, differentiable; costs one more forward pass of the student."""
        return gradients.taylor_trace(
            self.student, self.images.detach(), self.student_logits, self.labels, sigma=sigma, target=target
        )

    def teacher_input_gradient(self, target: str) -> Tensor:
        """(B, C, H, W), constant."""
        if target not in self._teacher_gradients:
            self._teacher_gradients[target] = self._teacher.input_gradient(self.batch, target)
        return self._teacher_gradients[target]

    def angle(self) -> Tensor | None:
        """Mean angle in degrees between the input-gradients that the terms have asked for; None without any."""
        angles = [
            gradients.angle(student.detach(), self._teacher_gradients[target])
            for (target, _), student in self._student_gradients.items()
            if target in self._teacher_gradients
        ]
        return torch.stack(angles).mean() if angles else None

    @property
    def _teacher(self) -> Targets:
        if self.teacher is None:
            raise ValueError("this step has no teacher")
        return self.teacher
