from torch import Tensor

from gradexp.gradients import attention_map
from gradexp.terms.maps import MatchMaps
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class Attention(MatchMaps):
    """Distance of attention maps A = sum of squares over channels, at norm 1 (Eqs. 2.7, 2.8).

    Eq. 2.8 is the distance itself, common code (and Chapter 4 here) takes its square: `squared`. Sum over the pairs
    of layers, which must have the same spatial sizes; mean over the batch.
    """

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return tuple(Map("attention", layer) for layer in self.teacher_layers)

    def student_map(self, step: Step, layer: str) -> Tensor:
        return attention_map(step.student_features(layer))

    def teacher_map(self, step: Step, layer: str) -> Tensor:
        return step.teacher_map(Map("attention", layer))
