"""The base class of all loss terms."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from gradexp.base.ranges import NonNegative, require
from gradexp.gradients import Layer, find_layer, layer_bias
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class Term(nn.Module, ABC):
    """A differentiable scalar of one step; the training loss is the sum of weight * term.

    A subclass declares what it reads, so that a step computes it once for all terms:
    needs_teacher: whether the step must have a teacher.
    gradient_target: the output whose gradient it reads, see gradients.scalar (`attention` for an attention pixel), or None.
    needs_input_gradient: whether that includes the gradient at the input, not only at layers.
    student_layers, teacher_layers: the modules whose outputs, or the gradients at them, it reads.
    teacher_maps: all that it reads of `teacher_layers`, if that can be stored before training.
    reads_bias: whether it reads the effective biases of `student_layers`, which are then `student_biases`.
    full_precision: whether mixed precision would spoil it; the whole step is then computed in float32.
    observed: scalars of the last step, detached means over its images, recorded as curves beside the loss.
    """

    needs_teacher = False
    gradient_target: str | None = None
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    reads_bias = False
    student_biases: tuple[Layer, ...] = ()
    full_precision = False

    def __init__(self, *, weight: NonNegative) -> None:
        super().__init__()
        require(NonNegative, weight=weight)
        self.weight = weight
        self.observed: dict[str, Tensor] = {}

    @property
    def needs_input_gradient(self) -> bool:
        return self.gradient_target is not None

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return ()

    def check(self, student: nn.Module) -> None:
        """Raises UserError for a student that this term can't train; called once, before training."""

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        """Replaces rules such as `block 2` (gradients.find_layer) by names of modules; called once, before training.

        images (B, C, H, W): any of the right size. Raises UserError for a rule that matches nothing.
        """
        layers = tuple(find_layer(student, rule, images) for rule in self.student_layers)
        self.student_layers = tuple(layer.name for layer in layers)
        self.student_biases = layers if self.reads_bias else ()
        for layer in self.student_biases:
            layer_bias(student, layer)
        if teacher is not None:
            self.teacher_layers = tuple(find_layer(teacher, rule, images).name for rule in self.teacher_layers)

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The term's value, a differentiable scalar, not yet multiplied by its weight."""


def reduce(values: Tensor, reduction: str) -> Tensor:
    """`sum` or `mean` over all dimensions but the first, mean over the batch: (B, ...) -> scalar."""
    each = values.flatten(1)
    return (each.sum(1) if reduction == "sum" else each.mean(1)).mean()
