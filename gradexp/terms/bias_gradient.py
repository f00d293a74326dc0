from torch import Tensor, nn

from gradexp.base.errors import choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import SCALARS, precise, precise_sum
from gradexp.terms.layer_bias import LayerBias
from gradexp.terms.maps import map_size
from gradexp.terms.step import Step
from gradexp.terms.term import reduce


class BiasGradient(LayerBias):
    """Squared norm of one layer's bias-gradient f^b = b ⊙ ∇_b f (Proposition 10, second term; σ² is the weight).

    With bias=explicit it vanishes with b, so that training can lower it without a smaller gradient.
    bias: b, see LayerBias; or `none` for ∇_b f without the factor b, which §4.2 calls bias-gradient, too.
    noise: what shares one draw of the proposition's multiplicative noise: each `position` has its own (f^b is then a map, as
    in §3.4.2), or a `channel` shares one (∂f/∂b is then summed over positions).
    target: the output f, see gradients.scalar. reduction: `sum` (the proposition's) or `mean` over the layer; mean over the
    batch. layer, student_bn: see LayerBias.
    """

    needs_input_gradient = False

    def __init__(
        self, *, weight: NonNegative, layer: str, bias: str, noise: str, target: str, reduction: str, student_bn: str
    ) -> None:
        self.has_factor = choose("bias", bias, "explicit", "effective", "none") != "none"
        super().__init__(weight=weight, layer=layer, bias=bias if self.has_factor else "explicit", student_bn=student_bn)
        self.reduction = choose("reduction", reduction, "sum", "mean")
        self.noise = choose("noise", noise, "position", "channel")
        self.target = self.gradient_target = choose("target", target, *SCALARS)

    def resolve_layers(self, student: nn.Module, teacher: nn.Module | None, images: Tensor) -> None:
        super().resolve_layers(student, teacher, images)
        map_size(student, self.layer, images)

    def forward(self, step: Step) -> Tensor:
        gradient = step.student_layer_gradients(self.target, self.student_bn)[self.layer].flatten(2)
        gradient = precise_sum(gradient, 2)[..., None] if self.noise == "channel" else precise(gradient)
        bias = self.bias(step).view(-1, 1) if self.has_factor else 1
        return reduce((bias * gradient).square(), self.reduction)
