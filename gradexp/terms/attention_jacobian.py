from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, NonNegative, require
from gradexp.gradients import attention_map, precise
from gradexp.terms.maps import common_size
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class AttentionJacobian(Term):
    """Squared distance between the input-gradients of one attention pixel, each divided by its norm (Eq. 2.9).

    The attention maps (Eq. 2.7) of one pair of layers are averaged over a square window with stride 1 (§2.6.3, §2.12.2). The
    pixel is the teacher's largest, for both networks (§2.5.2). Sum over image pixels; mean over the batch. With batch
    statistics, the student's pixel of one image depends on the other images, too: its gradient is that of the sum of all
    pixels, as in the author's code.
    student_layers, teacher_layers: pairs of layers, of which only number `level`, counted from 1, is used (Table 2.4).
    window: side of the square, see window_size. student_bn: the student's batch normalisation uses `batch` or `running`
    statistics.
    """

    needs_teacher = True
    gradient_target = "attention"

    def __init__(
        self,
        *,
        weight: NonNegative,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str],
        level: Count,
        window: str | int,
        student_bn: str,
    ) -> None:
        super().__init__(weight=weight)
        require(Count, level=level)
        levels = min(len(student_layers), len(teacher_layers))
        if level > levels:
            raise UserError(f"level={level}: it must be from 1 to {levels}, the number of layer pairs")
        self.student_layers, self.teacher_layers = (student_layers[level - 1],), (teacher_layers[level - 1],)
        self.window, self.student_bn = window, choose("student_bn", student_bn, "batch", "running")

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().resolve_layers(student, teacher, images)
        if teacher is not None:
            size = common_size((student, self.student_layers[0]), (teacher, self.teacher_layers[0]), images)
            window_size(self.window, min(size))

    def forward(self, step: Step) -> Tensor:
        largest = pooled(attention_map(step.teacher_features(self.teacher_layers[0])), self.window).argmax(dim=1)

        def pixel(features: Tensor) -> Tensor:
            return pooled(attention_map(features), self.window).gather(1, largest[:, None])[:, 0]

        student = step.student_feature_gradient(self.student_layers[0], pixel, self.student_bn)
        teacher = step.teacher_feature_gradient(self.teacher_layers[0], pixel)
        student, teacher = (functional.normalize(precise(each).flatten(1), dim=1) for each in (student, teacher))
        return (student - teacher).square().sum(1).mean()


def pooled(maps: Tensor, window: str | int) -> Tensor:
    """Averages of each map over all positions of the window: (B, h, w) -> (B, positions)."""
    return functional.avg_pool2d(maps[:, None], window_size(window, min(maps.shape[1:])), stride=1).flatten(1)


def window_size(window: str | int, size: int) -> int:
    """Width in pixels of an averaging window on a map that is `size` pixels wide (Table 2.5).

    window: `full`, `none` (one pixel), `s/N` (the size divided by N, rounded down, at least one pixel) or a number of pixels.
    Raises UserError for any other word and for a window larger than the map.
    """
    word, named = str(window), {"full": size, "none": 1}
    if word in named:
        return named[word]
    if word.startswith("s/") and word[2:].isdecimal() and int(word[2:]):
        return max(1, size // int(word[2:]))
    if not word.isdecimal() or not int(word):
        raise UserError(f"window={window}: it must be full, none, s/N or a number of pixels")
    if int(word) > size:
        raise UserError(f"window={window}: the attention map has only {size}x{size} pixels; take a smaller window, or s/5")
    return int(word)
