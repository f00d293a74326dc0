"""What all loss terms have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from gradexp.base.ranges import NonNegative
from gradexp.gradients import Layer, find_layer, layer_bias
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class Term(nn.Module, ABC):
    """A differentiable scalar of one step; the training loss is the sum of weight * term.

    needs_teacher: whether the step must have one. gradient_target: whose gradient it needs (see
    gradexp.gradients.scalar; `attention` for a scalar of its own), None for a term without gradients.
    needs_input_gradient: whether that is the gradient at the input, or at layers alone. full_precision: whether mixed
    precision would spoil it; the whole step is then computed in full.

    student_layers, teacher_layers: the modules whose outputs, or the gradients there, it reads. teacher_maps: all that
    it asks of `teacher_layers`, where that can be stored. reads_bias: whether it reads the bias of `student_layers`.

    seen: scalars of the last step, detached means over its images, that are recorded as curves beside the loss.
    """

    needs_teacher = False
    gradient_target: str | None = None
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    reads_bias = False
    student_biases: tuple[Layer, ...] = ()
    full_precision = False

    @property
    def needs_input_gradient(self) -> bool:
        return self.gradient_target is not None

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return ()

    def __init__(self, *, weight: NonNegative) -> None:
        super().__init__()
        self.weight = weight
        self.seen: dict[str, Tensor] = {}

    def check(self, student: nn.Module) -> None:
        """Raises UserError for a student that this term can't train; called once, before training."""

    def place(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        """Before training: turns the places of layers (gradients.find_layer) into the names of modules.

        images (B, C, H, W): any, of the right size. Raises UserError when nothing matches.
        """
        found = [find_layer(student, rule, images) for rule in self.student_layers]
        self.student_layers = tuple(layer.name for layer in found)
        self.student_biases = tuple(found) if self.reads_bias else ()
        for layer in self.student_biases:
            layer_bias(student, layer)
        if teacher is not None:
            self.teacher_layers = tuple(find_layer(teacher, rule, images).name for rule in self.teacher_layers)

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The term's value, a differentiable scalar."""


def reduce(values: Tensor, reduction: str) -> Tensor:
    """Sum or mean over all but the first dimension, mean over the batch. (B, ...) -> scalar."""
    each = values.flatten(1)
    return (each.sum(1) if reduction == "sum" else each.mean(1)).mean()
