"""The values of one training step, each computed when a term first reads it and shared by all terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Positive
from gradexp.data.loader import Batch
from gradexp.gradients import Layer
from gradexp.gradients.capture import module_of
from gradexp.terms.targets import Map, Targets

GIVEN = " given"  # behind the name of a normalisation: what it is given


class Step:
    """Images, labels, student and teacher of one step.

    differentiable_input: whether a term needs the student's input-gradient. student_layers: names of the student's modules
    whose outputs, or the gradients at them, terms read. student_biases: layers whose effective bias terms read.

    `target` is the output whose gradient is taken (gradients.scalar). `student_bn`, the statistics of the student's batch
    normalisation: `batch` runs the student in its present mode, which in training means the statistics of the batch, and
    gradients are then those of the sum over the batch; `running` runs it in eval mode, where images do not influence each
    other.
    The target `top` is the class of the teacher's largest logit, for both networks, so that gradients of the same output are
    matched; without a teacher it is the student's own.
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
        if isinstance(teacher, nn.Module):
            raise UserError("a step takes what terms read of a teacher: Step(..., teacher=Targets(model, with_gradient=True))")
        self.batch, self.student, self.teacher = batch, student, teacher
        self.images = batch.images.detach().requires_grad_() if differentiable_input else batch.images
        self.labels = batch.labels
        self.student_layers = student_layers
        self.student_biases = {layer.name: layer for layer in student_biases}
        self._forwards: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}  # by student_bn
        self._input_gradients: dict[tuple[str, str], Tensor] = {}  # those that terms have read
        self._layer_gradients: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._teacher_gradients: dict[str, Tensor] = {}

    # The student

    @property
    def student_logits(self) -> Tensor:
        """Logits with `batch` statistics, differentiable: (B, K)."""
        return self._forward("batch")[0]

    def student_features(self, layer: str, student_bn: str = "batch") -> Tensor:
        """The output of one of `student_layers`, differentiable: (B, c, h, w)."""
        features = self._forward(student_bn)[1]
        if layer not in features:
            raise UserError(f"{layer} is none of the layers of this step: pass Step(..., student_layers=['{layer}'])")
        return features[layer]

    def student_input_gradient(self, target: str, student_bn: str) -> Tensor:
        """Differentiable: (B, C, H, W), or the full Jacobian (B, K, C, H, W) for `all`."""
        key = (target, student_bn)
        if key not in self._input_gradients:
            self._check_input()
            if target == "all":
                logits, recorded = self._forward(student_bn)[0], torch.is_grad_enabled()
                gradient = gradients.gradient_of(logits, self.images, self.labels, target=target, differentiable=recorded)
            else:
                gradient = self.student_layer_gradients(target, student_bn)[gradients.INPUT]
            self._input_gradients[key] = gradient
        return self._input_gradients[key]

    def student_layer_gradients(self, target: str, student_bn: str) -> dict[str, Tensor]:
        """Gradients at all of `student_layers` and, with a differentiable input, at gradients.INPUT, in one backward pass.

        Differentiable: {layer: (B, c, h, w)}.
        """
        key = (target, student_bn)
        if key not in self._layer_gradients:
            if not self.student_layers:
                self._check_input()
            logits, features = self._forward(student_bn)
            values = {gradients.INPUT: self.images} if self.images.requires_grad else {}
            values |= {layer: features[layer] for layer in self.student_layers}
            scalar, labels = self._scalar(target)
            self._layer_gradients[key] = gradients.gradients_of(
                logits, values, labels, target=scalar, differentiable=torch.is_grad_enabled()
            )
        return self._layer_gradients[key]

    def _check_input(self) -> None:
        if not self.images.requires_grad:
            raise UserError(
                "this step has no input-gradient: a term that reads it declares its gradient_target, such as 'label'; in "
                "Python, pass Step(..., differentiable_input=True)"
            )

    def student_bias(self, layer: str, student_bn: str) -> Tensor:
        """The effective bias of one of `student_biases` (gradients.effective_bias), differentiable: (c,)."""
        biased = self.student_biases[layer]
        if student_bn == "running" or not self._is_training(biased):
            return gradients.layer_bias(self.student, biased)
        return gradients.layer_bias(self.student, biased, self.student_features(biased.before or f"{layer}{GIVEN}"))

    def _is_training(self, layer: Layer) -> bool:
        """Whether a normalisation uses the statistics of the batch."""
        module = self.student.get_submodule(module_of(layer.name))
        return isinstance(module, gradients.NORMS) and module.training

    def student_feature_gradient(self, layer: str, pick: Callable[[Tensor], Tensor], student_bn: str) -> Tensor:
        """The input-gradient of `pick`, one value per image from a layer's output, differentiable: (B, C, H, W)."""
        self._check_input()
        values = pick(self.student_features(layer, student_bn))
        return gradients.gradient_of_values(values, self.images, differentiable=torch.is_grad_enabled())

    def student_hessian_trace(self, estimator: str, sigma: Positive, target: str, student_bn: str) -> Tensor:
        """One-sample estimate of the trace of the Hessian, differentiable: (B,).

        estimator: `taylor` (Eq. 5.9) costs one more forward pass, of images with noise of standard deviation sigma, which have
        batch statistics of their own; `hutchinson` costs one more backward pass. Raises UserError for `hutchinson` where a
        layer has no third derivative.
        """
        if estimator == "hutchinson":
            gradients.check_third_derivatives(self.student)
            gradient = self.student_input_gradient(target, student_bn)
            return gradients.hutchinson_trace(gradient, self.images, differentiable=torch.is_grad_enabled())
        logits, _ = self._forward(student_bn)
        scalar, labels = self._scalar(target)
        with self._statistics(student_bn):
            return gradients.taylor_trace(self.student, self.images.detach(), logits, labels, sigma=sigma, target=scalar)

    def _scalar(self, target: str) -> tuple[str, Tensor]:
        """The target and labels to hand to gradients.scalar for the student."""
        if target == "top" and self.teacher is not None:
            return "label", self.teacher_logits.max(dim=1).indices
        return target, self.labels

    def _forward(self, student_bn: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and the outputs of `student_layers` and of the convolutions before `student_biases`."""
        if student_bn not in self._forwards:
            with self._statistics(student_bn):
                self._forwards[student_bn] = self._captured()
        return self._forwards[student_bn]

    def _statistics(self, student_bn: str) -> AbstractContextManager[None]:
        """A context in which the student is in eval mode for `running` statistics, in its present mode otherwise."""
        return gradients.evaluating(self.student) if student_bn == "running" else nullcontext()

    def _captured(self) -> tuple[Tensor, dict[str, Tensor]]:
        before = [layer.before for layer in self.student_biases.values() if layer.before]
        alone = [name for name, layer in self.student_biases.items() if not layer.before and self._is_training(layer)]
        with ExitStack() as stack:
            features = stack.enter_context(gradients.captured(self.student, [*self.student_layers, *before]))
            for name in alone:  # normalisations whose input is no layer's output
                module, keep = self.student.get_submodule(module_of(name)), partial(_keep_input, features, f"{name}{GIVEN}")
                stack.callback(module.register_forward_pre_hook(keep).remove)
            return self.student(self.images), features

    # The teacher; all values are constants

    @cached_property
    def teacher_logits(self) -> Tensor:
        """(B, K)."""
        return self._teacher.logits(self.batch)

    def teacher_features(self, layer: str) -> Tensor:
        """The output of one of the teacher's layers: (B, c, h, w)."""
        return self._teacher.features(self.batch, layer)

    def teacher_input_gradient(self, target: str) -> Tensor:
        """(B, C, H, W), or the full Jacobian (B, K, C, H, W) for `all`."""
        if target not in self._teacher_gradients:
            self._teacher_gradients[target] = self._teacher.input_gradient(self.batch, target)
        return self._teacher_gradients[target]

    def teacher_feature_gradient(self, layer: str, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The input-gradient of `pick`, one value per image from a layer's output: (B, C, H, W)."""
        return self._teacher.feature_gradient(self.batch, layer, pick)

    def teacher_layer_gradient(self, layer: str, target: str) -> Tensor:
        """The gradient of `target` at one of the teacher's layers: (B, c, h, w)."""
        return self._teacher.layer_gradient(self.batch, layer, target)

    def teacher_map(self, wanted: Map) -> Tensor:
        """A map of one of the teacher's layers: (B, h, w)."""
        return self._teacher.map(self.batch, wanted)

    def angle(self) -> Tensor | None:
        """Mean angle in degrees between the input-gradients of student and teacher that terms have read; None for none."""
        angles = [
            gradients.angle(gradient.detach(), self._teacher_gradients[target])
            for (target, _), gradient in self._input_gradients.items()
            if target in self._teacher_gradients
        ]
        return torch.stack(angles).mean() if angles else None

    @property
    def _teacher(self) -> Targets:
        if self.teacher is None:
            raise UserError(
                "this step has no teacher: a term that reads it declares needs_teacher = True; in Python, pass "
                "Step(..., teacher=Targets(model, with_gradient=True))"
            )
        return self.teacher


def _keep_input(features: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    features[name] = args[0]
