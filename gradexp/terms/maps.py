"""Matching what layers of teacher and student have in common when their channels differ: maps summed over channels."""

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
    """Sum over pairs of layers of the distance between student's and teacher's map, each of norm 1; mean over the batch.

    student_layers, teacher_layers: pairs of layers, each by its name or by its place (gradients.find_layer).
    squared: whether the distance is. A map that is smaller than its partner is resized, where `resizes`.
    """

    needs_teacher = True
    resizes = False

    def __init__(
        self, *, weight: NonNegative, student_layers: Sequence[str], teacher_layers: Sequence[str], squared: bool
    ) -> None:
        super().__init__(weight=weight)
        if len(student_layers) != len(teacher_layers):
            raise UserError(
                f"student_layers are {len(student_layers)}, teacher_layers {len(teacher_layers)}: they are matched in pairs"
            )
        self.student_layers, self.teacher_layers, self.squared = tuple(student_layers), tuple(teacher_layers), squared

    def place(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().place(student, teacher, images)
        if teacher is None:
            return
        for mine, theirs in zip(self.student_layers, self.teacher_layers, strict=True):
            common_size((student, mine), (teacher, theirs), images, resizes=self.resizes)

    def forward(self, step: Step) -> Tensor:
        pairs = zip(self.student_layers, self.teacher_layers, strict=True)
        parts = [self.distance(self.student_map(step, mine), self.teacher_map(step, theirs)) for mine, theirs in pairs]
        return torch.stack(parts).sum()

    @abstractmethod
    def student_map(self, step: Step, layer: str) -> Tensor:
        """(B, h, w), differentiable."""

    @abstractmethod
    def teacher_map(self, step: Step, layer: str) -> Tensor:
        """(B, h, w)."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, h, w) and (B, h', w') -> scalar."""
        size = max(student.shape[1:], teacher.shape[1:])
        units = [functional.normalize(resized(maps, size).flatten(1), dim=1) for maps in (student, teacher.to(student))]
        difference = units[0] - units[1]
        return (difference.square().sum(1) if self.squared else torch.linalg.vector_norm(difference, dim=1)).mean()


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, h, w) -> (B, *size), bilinear; maps of this size are left alone."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return functional.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]


def common_size(
    mine: tuple[nn.Module, str], theirs: tuple[nn.Module, str], images: Tensor, *, resizes: bool = False
) -> torch.Size:
    """Rows and columns of the maps of the student's layer and the teacher's. Raises UserError where they differ.

    resizes: whether one may be smaller than the other; the larger size is then returned.
    """
    sizes = map_size(*mine, images), map_size(*theirs, images)
    if sizes[0] != sizes[1] and not (resizes and sorted(sizes) == [torch.Size(map(min, *sizes)), max(sizes)]):
        raise UserError(
            f"the student's {mine[1]} has {_pixels(sizes[0])} positions, the teacher's {theirs[1]} {_pixels(sizes[1])}: "
            f"choose student_layers and teacher_layers of common spatial sizes"
        )
    return max(sizes)


def map_size(model: nn.Module, layer: str, images: Tensor) -> torch.Size:
    """Rows and columns of a layer's output. Raises UserError where it has none."""
    with gradients.evaluating(model), torch.no_grad(), gradients.captured(model, [layer]) as outputs:
        model(images)
    if outputs[layer].dim() != 4:
        raise UserError(f"the output of {layer} is no map: choose a layer with channels, rows and columns")
    return outputs[layer].shape[2:]


def _pixels(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
