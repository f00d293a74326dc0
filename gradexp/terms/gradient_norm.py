from torch import Tensor

from gradexp.base.errors import choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import TARGETS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class GradientNorm(Term):
    """Squared norm of the student's input-gradient (Proposition 2, second term; the ½ of Eq. 5.4 belongs to the weight).

    target: the output whose gradient is taken, see gradients.scalar: `all` is the proposition's sum over classes, `label` its
    approximation (§2.4.1), `logprob` the penalty of Eq. 2.3. reduction: `sum` (the proposition's) or `mean` over pixels (and
    classes); mean over the batch. student_bn: batch normalisation uses `batch` or `running` statistics.
    """

    def __init__(self, *, weight: NonNegative, reduction: str, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.reduction = choose("reduction", reduction, "sum", "mean")
        self.target = self.gradient_target = choose("target", target, *TARGETS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        return reduce(precise(step.student_input_gradient(self.target, self.student_bn)).square(), self.reduction)
