"""Matching layers of teacher and student whose channels differ, by maps that are summed over channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import NonNegative
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class MatchMaps(Term, ABC):
    """Distance between maps of student and teacher, each divided by its norm; sum over pairs of layers, mean over the batch.

    student_layers, teacher_layers: the pairs, as names of modules or rules such as `block 2` (gradients.find_layer).
    squared: whether the distance is squared. resizes: whether the smaller map of a pair is resized to the larger.
    Raises UserError, before training, for pairs of other spatial sizes than that allows.
    """

    needs_teacher = True
    resizes = False

    def __init__(
        self, *, weight: NonNegative, student_layers: Sequence[str], teacher_layers: Sequence[str], squared: bool
    ) -> None:
        super().__init__(weight=weight)
        if len(student_layers) != len(teacher_layers):
            raise UserError(
                f"student_layers has {len(student_layers)} entries, teacher_layers {len(teacher_layers)}: "
                "they are matched in pairs; give equally many"
            )
        self.student_layers, self.teacher_layers, self.squared = tuple(student_layers), tuple(teacher_layers), squared

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().resolve_layers(student, teacher, images)
        if teacher is not None:
            for student_layer, teacher_layer in self._pairs():
                common_size((student, student_layer), (teacher, teacher_layer), images, resizes=self.resizes)

    def forward(self, step: Step) -> Tensor:
        distances = [
            self.distance(self.student_map(step, ours), self.teacher_map(step, theirs)) for ours, theirs in self._pairs()
        ]
        return torch.stack(distances).sum()

    @abstractmethod
    def student_map(self, step: Step, layer: str) -> Tensor:
        """The map of a layer of the student, differentiable: (B, h, w)."""

    @abstractmethod
    def teacher_map(self, step: Step, layer: str) -> Tensor:
        """The map of a layer of the teacher: (B, h, w)."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the batch of the distance between two maps of norm 1: (B, h, w) and (B, h', w') -> scalar."""
        size = max(student.shape[1:], teacher.shape[1:])  # one contains the other, which resolve_layers checked
        units = [functional.normalize(resized(maps, size).flatten(1), dim=1) for maps in (student, teacher.to(student))]
        difference = units[0] - units[1]
        return (difference.square().sum(1) if self.squared else torch.linalg.vector_norm(difference, dim=1)).mean()

    def _pairs(self) -> list[tuple[str, str]]:
        return list(zip(self.student_layers, self.teacher_layers, strict=True))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) resized bilinearly to (B, *size); those that have this size are returned unchanged."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return functional.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def common_size(
    student: tuple[nn.Module, str], teacher: tuple[nn.Module, str], images: Tensor, *, resizes: bool = False
) -> torch.Size:
    """Rows and columns at which the outputs of two layers, each a (model, layer), are compared.

    resizes: whether one layer may be smaller than the other in rows and columns; the larger size is then returned.
    Raises UserError for sizes that differ otherwise.
    """
    sizes = map_size(*student, images), map_size(*teacher, images)
    smaller, larger = sorted(sizes)
    contained = all(length <= limit for length, limit in zip(smaller, larger, strict=True))
    if smaller != larger and not (resizes and contained):
        raise UserError(
            f"the student's {student[1]} has {_pixels(sizes[0])} positions, the teacher's {teacher[1]} {_pixels(sizes[1])}: "
            f"choose student_layers and teacher_layers of common spatial sizes"
        )
    return larger


def map_size(model: nn.Module, layer: str, images: Tensor) -> torch.Size:
    """Rows and columns of a layer's output. Raises UserError for an output that is not (B, c, h, w)."""
    with gradients.evaluating(model), torch.no_grad(), gradients.captured(model, [layer]) as outputs:
        model(images)
    if outputs[layer].dim() != 4:
        raise UserError(f"the output of {layer} is no map: choose a layer with channels, rows and columns")
    return outputs[layer].shape[2:]


def _pixels(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
