from torch import Tensor

from gradexp.base.errors import choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import TARGETS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class GradientNorm(Term):
    """Squared norm of the student's input-gradient (Proposition 2, second term; Chapter 5's ½ goes into the weight).

    target: whose gradient; `logprob` is the penalty of Eq. 2.3. reduction: `sum` or `mean` over pixels; mean over
    the batch. student_bn: `batch` or `running` statistics.
    """

    def __init__(self, *, weight: NonNegative, reduction: str, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.reduction = choose("reduction", reduction, "sum", "mean")
        self.target = self.gradient_target = choose("target", target, *TARGETS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        return reduce(precise(step.student_input_gradient(self.target, self.student_bn)).square(), self.reduction)
