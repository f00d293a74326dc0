from collections.abc import Sequence

from torch import Tensor

from gradexp.errors import UserError
from gradexp.gradients import attention_map
from gradexp.terms.maps import MatchMaps
from gradexp.terms.step import Step
from gradexp.terms.targets import POWERS, Map


class Attention(MatchMaps):
    """Distance of attention maps A, sums over channels of |z|^power, at norm 1 (Eq. 2.8).

    power: 1, absolute values (§4.4.1), or 2, squares (Eq. 2.7), which None means too. Eq. 2.8 is the distance itself,
    common code (and Chapter 4 here) takes its square: `squared`. Sum over the pairs of layers, which must have the same
    spatial sizes; mean over the batch.
    """

    def __init__(
        self,
        *,
        weight: float,
        student_layers: Sequence[str],
        teacher_layers: Sequence[str],
        squared: bool,
        power: int | None = None,
    ) -> None:
        super().__init__(weight=weight, student_layers=student_layers, teacher_layers=teacher_layers, squared=squared)
        kinds = {number: kind for kind, number in POWERS.items()}
        self.power = 2 if power is None else power
        if self.power not in kinds:
            raise UserError(f"power={power}: it is 1 (absolute values) or 2 (squares)")
        self.kind = kinds[self.power]

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return tuple(Map(self.kind, layer) for layer in self.teacher_layers)

    def student_map(self, step: Step, layer: str) -> Tensor:
        return attention_map(step.student_features(layer), self.power)

    def teacher_map(self, step: Step, layer: str) -> Tensor:
        return step.teacher_map(Map(self.kind, layer))
