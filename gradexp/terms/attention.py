from typing import Any

from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.gradients import attention_map
from gradexp.terms.maps import MatchMaps
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class Attention(MatchMaps):
    """Distance between attention maps A = Σ_channels |z|^power, each divided by its norm (Eq. 2.8).

    power: 1, absolute values (§4.4.1), or 2, squares (Eq. 2.7).
    squared: false for the distance itself, as Eq. 2.8 is printed; true for its square, as in common code and Chapter 4 here.
    Sum over the pairs of layers, which must have equal spatial sizes; mean over the batch.
    """

    def __init__(self, *, power: int = 2, **options: Any) -> None:
        super().__init__(**options)
        if power not in (1, 2):
            raise UserError(f"power={power}: it must be 1 (absolute values) or 2 (squares)")
        self.power = power
        self.kind = "absolute" if self.power == 1 else "attention"

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return tuple(Map(self.kind, layer) for layer in self.teacher_layers)

    def student_map(self, step: Step, layer: str) -> Tensor:
        return attention_map(step.student_features(layer), self.power)

    def teacher_map(self, step: Step, layer: str) -> Tensor:
        return step.teacher_map(Map(self.kind, layer))
