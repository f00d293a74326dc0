from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import choose
from gradexp.gradients import SCALARS, channel_sum, find_layer, layer_bias
from gradexp.terms.maps import MatchMaps
from gradexp.terms.step import Step
from gradexp.terms.targets import Map


class FullGradient(MatchMaps):
    """Distance of bias-gradients summed over channels, at norm 1 (Eq. 4.3); input-gradients are Jacobian's part.

    The gradient with respect to a layer's bias is the gradient at its output. times_bias: multiply it with the
    (effective) bias, which makes it f^b of Chapter 3; a teacher's targets can't be stored then. Sum over the pairs of
    layers, the smaller map resized to the larger one; mean over the batch.
    target: whose gradient. student_bn: `batch` or `running` statistics.
    """

    resizes = True

    @property
    def needs_input_gradient(self) -> bool:
        return False

    def __init__(self, *, target: str, student_bn: str, times_bias: bool, **options: Any) -> None:
        super().__init__(**options)
        self.target = self.gradient_target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")
        self.reads_bias = times_bias

    @property
    def teacher_maps(self) -> tuple[Map, ...]:
        return () if self.reads_bias else tuple(Map("gradient", layer, self.target) for layer in self.teacher_layers)

    def place(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        rules = self.teacher_layers
        super().place(student, teacher, images)
        if self.reads_bias and teacher is not None:
            found = [find_layer(teacher, rule, images) for rule in rules]
            self.teacher_biases = {layer.name: layer_bias(teacher, layer).detach() for layer in found}

    def student_map(self, step: Step, layer: str) -> Tensor:
        gradient = step.student_layer_gradients(self.target, self.student_bn)[layer]
        if not self.reads_bias:
            return channel_sum(gradient)
        return channel_sum(step.student_bias(layer, self.student_bn).view(-1, 1, 1) * gradient)

    def teacher_map(self, step: Step, layer: str) -> Tensor:
        if not self.reads_bias:
            return step.teacher_map(Map("gradient", layer, self.target))
        return channel_sum(self.teacher_biases[layer].view(-1, 1, 1) * step.teacher_layer_gradient(layer, self.target))
