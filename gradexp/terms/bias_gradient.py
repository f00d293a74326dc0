from torch import Tensor

from gradexp.gradients import TARGETS
from gradexp.terms.step import Step
from gradexp.terms.term import Term, choose, precise


class BiasGradient(Term):
    """Squared norm of one layer's bias-gradient f^b, bias times gradient (Proposition 10, second term).

    layer: by its name or its place (gradients.find_layer). noise: the multiplicative noise that this stands for; one
    draw a `position` (f^b is a map, §3.4.2), or one a `channel` and image. target: whose gradient. student_bn: `batch`
    or `running` statistics. Sum over the layer, mean over the batch.
    """

    reads_bias = True

    def __init__(self, *, weight: float, layer: str, noise: str, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.student_layers = (layer,)
        self.noise = choose("noise", noise, "position", "channel")
        self.target = self.gradient_target = choose("target", target, *TARGETS[:3])
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    @property
    def needs_input_gradient(self) -> bool:
        return False

    def forward(self, step: Step) -> Tensor:
        (layer,) = self.student_layers
        gradient = precise(step.student_layer_gradients(self.target, self.student_bn)[layer]).flatten(2)
        if self.noise == "channel":
            gradient = gradient.sum(2, keepdim=True)
        bias = step.student_bias(layer, self.student_bn)
        return (bias.view(-1, 1) * gradient).square().flatten(1).sum(1).mean()
