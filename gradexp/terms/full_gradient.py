from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import choose
from gradexp.gradients import SCALARS, channel_sum, find_layer, layer_bias
from gradexp.terms.maps import MatchMaps
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class FullGradient(MatchMaps):
    """Distance between bias-gradients summed over channels, each divided by its norm (Eq. 4.3, §4.2).

    This is the bias part of a full-gradient (the result class is gradients.FullGradient); Jacobian matches input-gradients.
    The gradient with respect to a layer's bias is the gradient at its output. The smaller map of a pair is resized to the
    larger. Sum over the pairs of layers; mean over the batch.
    times_bias: multiply by the effective bias, which gives f^b of §3.4; the teacher's maps are then not stored.
    target: the output whose gradient is taken, see gradients.scalar. student_bn: `batch` or `running` statistics.
    """

    resizes = True
    needs_input_gradient = False

    def __init__(self, *, target: str, student_bn: str, times_bias: bool, **options: Any) -> None:
        super().__init__(**options)
        self.target = self.gradient_target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")
        self.reads_bias = times_bias

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return () if self.reads_bias else tuple(Map("gradient", layer, self.target) for layer in self.teacher_layers)

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        rules = self.teacher_layers
        super().resolve_layers(student, teacher, images)
        if self.reads_bias and teacher is not None:
            layers = [find_layer(teacher, rule, images) for rule in rules]
            self.teacher_biases = {layer.name: layer_bias(teacher, layer).detach() for layer in layers}

    def student_map(self, step: Step, layer: str) -> Tensor:
        gradient = step.student_layer_gradients(self.target, self.student_bn)[layer]
        if not self.reads_bias:
            return channel_sum(gradient)
        return channel_sum(step.student_bias(layer, self.student_bn).view(-1, 1, 1) * gradient)

    def teacher_map(self, step: Step, layer: str) -> Tensor:
        if not self.reads_bias:
            return step.teacher_map(Map("gradient", layer, self.target))
        return channel_sum(self.teacher_biases[layer].view(-1, 1, 1) * step.teacher_layer_gradient(layer, self.target))
