from torch import Tensor

from gradexp.terms.step import Step
from gradexp.terms.term import Term, choose


class BiasDecay(Term):
    """Weight decay on the bias of one layer (§4.4.2): its squared norm.

    layer: by its name or its place (gradients.find_layer). student_bn: `batch` or `running` statistics in the bias of
    a normalisation, which is the effective one (gradients.effective_bias), as for BiasGradient.
    """

    reads_bias = True

    def __init__(self, *, weight: float, layer: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.student_layers = (layer,)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        return step.student_bias(self.student_layers[0], self.student_bn).square().sum()
