"""One training step's values, computed when a term first asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.ranges import Positive
from gradexp.data.loader import Batch
from gradexp.gradients import Layer
from gradexp.terms.targets import Map, Targets


class Step:
    """Images, labels, student and teacher of one step; terms share its forwards and gradients.

    differentiable_input: whether some term needs the student's input-gradient. student_layers: the names of the
    modules of the student whose outputs, or the gradients there, terms read. student_biases: layers whose bias they
    read.

    The target `top` is the class that the teacher gives the largest logit, for both networks: gradients of one output
    can be matched, those of two classes can't. Without a teacher it is the student's own.
    """

    def __init__(
        self,
        batch: Batch,
        student: nn.Module,
        teacher: Targets | None = None,
        *,
        differentiable_input: bool = False,
        student_layers: Sequence[str] = (),
        student_biases: Sequence[Layer] = (),
    ) -> None:
        self.batch, self.student, self.teacher = batch, student, teacher
        self.images = batch.images.detach().requires_grad_() if differentiable_input else batch.images
        self.labels = batch.labels
        self.student_layers = student_layers
        self.student_biases = {layer.name: layer for layer in student_biases}
        self._student_gradients: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._teacher_gradients: dict[str, Tensor] = {}

    # The student

    @property
    def student_logits(self) -> Tensor:
        """(B, K), in the student's present mode."""
        return self._batch_forward[0]

    def student_features(self, layer: str, student_bn: str = "batch") -> Tensor:
        """The output of one of `student_layers`, (B, c, h, w), differentiable."""
        return self._forward(student_bn)[1][layer]

    def student_input_gradient(self, target: str, student_bn: str) -> Tensor:
        """(B, C, H, W), differentiable. student_bn: `batch` or `running` statistics in batch normalisation."""
        if target != "all":
            return self.student_layer_gradients(target, student_bn)[gradients.INPUT]
        key = (target, student_bn)
        if key not in self._student_gradients:
            gradient = gradients.gradient_of(
                self._forward(student_bn)[0], self.images, self.labels, target=target, differentiable=torch.is_grad_enabled()
            )
            self._student_gradients[key] = {gradients.INPUT: gradient}
        return self._student_gradients[key][gradients.INPUT]

    def student_layer_gradients(self, target: str, student_bn: str) -> dict[str, Tensor]:
        """Gradients at all of `student_layers` and, for a differentiable input, at gradients.INPUT, in one backward pass.

        {layer: (B, c, h, w)}, differentiable.
        """
        key = (target, student_bn)
        if key not in self._student_gradients:
            logits, features = self._forward(student_bn)
            values = {gradients.INPUT: self.images} if self.images.requires_grad else {}
            values |= {layer: features[layer] for layer in self.student_layers}
            whose, labels = self._chosen(target)
            self._student_gradients[key] = gradients.gradients_of(
                logits, values, labels, target=whose, differentiable=torch.is_grad_enabled()
            )
        return self._student_gradients[key]

    def student_bias(self, layer: str, student_bn: str) -> Tensor:
        """The effective bias of one of `student_biases` (gradients.effective_bias), (c,), differentiable."""
        place = self.student_biases[layer]
        statistics = place.before if student_bn == "batch" and self.student.training else None
        return gradients.layer_bias(self.student, place, self.student_features(statistics) if statistics else None)

    def student_feature_gradient(self, layer: str, pick: Callable[[Tensor], Tensor], student_bn: str) -> Tensor:
        """The input-gradient of one value an image that `pick` makes of a layer's output, (B, C, H, W), differentiable."""
        values = pick(self.student_features(layer, student_bn))
        return gradients.gradient_of_values(values, self.images, differentiable=torch.is_grad_enabled())

    def student_hessian_trace(self, estimator: str, sigma: Positive, target: str, student_bn: str) -> Tensor:
        """(B,), one-sample estimate, differentiable.

        estimator: `taylor` costs one more forward pass of the student, with noise of standard deviation sigma;
        `hutchinson` one more backward pass, and needs layers that are three times differentiable. student_bn: `running`
        statistics keep images apart, as at test time; `batch` statistics couple them, and the noisy pass has its own.
        """
        if estimator == "hutchinson":
            gradients.check_third_derivatives(self.student)
            gradient = self.student_input_gradient(target, student_bn)
            return gradients.hutchinson_trace(gradient, self.images, differentiable=torch.is_grad_enabled())
        logits, _ = self._forward(student_bn)
        whose, labels = self._chosen(target)
        with self._statistics(student_bn):
            return gradients.taylor_trace(self.student, self.images.detach(), logits, labels, sigma=sigma, target=whose)

    def _chosen(self, target: str) -> tuple[str, Tensor]:
        """The target and the labels that say which of the student's outputs is meant."""
        if target == "top" and self.teacher is not None:
            return "label", self.teacher_logits.max(dim=1).indices
        return target, self.labels

    def _forward(self, student_bn: str) -> tuple[Tensor, dict[str, Tensor]]:
        return self._batch_forward if student_bn == "batch" else self._running_forward

    @cached_property
    def _batch_forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and the outputs of `student_layers`."""
        return self._captured()

    @cached_property
    def _running_forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with running statistics, as at test time."""
        with self._statistics("running"):
            return self._captured()

    def _statistics(self, student_bn: str) -> AbstractContextManager[None]:
        """Inside, the student is in its present mode, or for `running` statistics in eval mode."""
        return gradients.evaluating(self.student) if student_bn == "running" else nullcontext()

    def _captured(self) -> tuple[Tensor, dict[str, Tensor]]:
        before = [layer.before for layer in self.student_biases.values() if layer.before]
        with gradients.captured(self.student, [*self.student_layers, *before]) as features:
            return self.student(self.images), features

    # The teacher: all of it constant

    @cached_property
    def teacher_logits(self) -> Tensor:
        """(B, K)."""
        return self._teacher.logits(self.batch)

    def teacher_features(self, layer: str) -> Tensor:
        """The output of one of the teacher's layers, (B, c, h, w)."""
        return self._teacher.features(self.batch, layer)

    def teacher_input_gradient(self, target: str) -> Tensor:
        """(B, C, H, W)."""
        if target not in self._teacher_gradients:
            self._teacher_gradients[target] = self._teacher.input_gradient(self.batch, target)
        return self._teacher_gradients[target]

    def teacher_feature_gradient(self, layer: str, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The teacher's input-gradient of one value an image that `pick` makes of a layer's output, (B, C, H, W)."""
        return self._teacher.feature_gradient(self.batch, layer, pick)

    def teacher_layer_gradient(self, layer: str, target: str) -> Tensor:
        """The gradient at one of the teacher's layers, (B, c, h, w)."""
        return self._teacher.layer_gradient(self.batch, layer, target)

    def teacher_map(self, wanted: Map) -> Tensor:
        """(B, h, w)."""
        return self._teacher.map(self.batch, wanted)

    def angle(self) -> Tensor | None:
        """Mean angle in degrees between the input-gradients that the terms have asked for; None without any."""
        angles = [
            gradients.angle(found[gradients.INPUT].detach(), self._teacher_gradients[target])
            for (target, _), found in self._student_gradients.items()
            if target in self._teacher_gradients
        ]
        return torch.stack(angles).mean() if angles else None

    @property
    def _teacher(self) -> Targets:
        if self.teacher is None:
            raise ValueError("this step has no teacher")
        return self.teacher
