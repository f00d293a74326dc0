from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Index, NonNegative
from gradexp.gradients import attention_map, precise
from gradexp.terms.maps import common_size
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class AttentionJacobian(Term):
    """Squared distance of the input-gradients of one attention pixel, each of norm 1 (Eq. 2.9); mean over the batch.

    The attention maps (Eq. 2.7) of one pair of layers, that of `level` (from 1), are averaged over a square window with
    stride 1. The pixel is the teacher's largest; the same one is taken of the student.
    window: see window_size. student_bn: `batch` or `running` statistics.
    """

    needs_teacher = True
    gradient_target = "attention"

    def __init__(
        self,
        *,
        weight: NonNegative,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str],
        level: Index,
        window: str | int,
        student_bn: str,
    ) -> None:
        super().__init__(weight=weight)
        if not 1 <= level <= min(len(student_layers), len(teacher_layers)):
            raise UserError(f"level={level}: there are the levels 1 to {min(len(student_layers), len(teacher_layers))}")
        self.student_layers, self.teacher_layers = (student_layers[level - 1],), (teacher_layers[level - 1],)
        self.window, self.student_bn = window, choose("student_bn", student_bn, "batch", "running")

    def place(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().place(student, teacher, images)
        if teacher is not None:
            size = common_size((student, self.student_layers[0]), (teacher, self.teacher_layers[0]), images)
            window_size(self.window, min(size))

    def forward(self, step: Step) -> Tensor:
        largest = pooled(attention_map(step.teacher_features(self.teacher_layers[0])), self.window).argmax(dim=1)

        def pick(features: Tensor) -> Tensor:
            values = pooled(attention_map(features), self.window)
            return values.gather(1, largest[:, None])[:, 0]

        student = step.student_feature_gradient(self.student_layers[0], pick, self.student_bn)
        teacher = step.teacher_feature_gradient(self.teacher_layers[0], pick)
        directions = [functional.normalize(precise(gradient).flatten(1), dim=1) for gradient in (student, teacher)]
        return (directions[0] - directions[1]).square().sum(1).mean()


def pooled(maps: Tensor, window: str | int) -> Tensor:
    """Averages over all windows of a map: (B, h, w) -> (B, positions)."""
    return functional.avg_pool2d(maps[:, None], window_size(window, min(maps.shape[1:])), stride=1).flatten(1)


def window_size(window: str | int, size: int) -> int:
    """How many pixels wide a window on a map of `size` pixels is.

    window: `full`, `none` (one pixel), `s/N` (a part of the size, rounded down, at least one pixel), or a number of pixels.
    Raises UserError for one that is larger than the map.
    """
    words = str(window)
    if words in ("full", "none"):
        return size if words == "full" else 1
    if words.startswith("s/") and words[2:].isdecimal() and int(words[2:]):
        return max(1, size // int(words[2:]))
    if not words.isdecimal() or not int(words):
        raise UserError(f"window={window}: it is full, none, s/N or a number of pixels")
    if int(words) > size:
        raise UserError(f"window={window}: the attention map has only {size}x{size} pixels; take a smaller window, or s/5")
    return int(words)
