from torch import Tensor

from gradexp.terms.step import Step
from gradexp.terms.term import Term, choose, precise, reduce


class Activations(Term):
    """Squared distance of student's and teacher's logits (Proposition 1, first term).

    reduction: `sum` or `mean` over the K classes; mean over the batch.
    """

    needs_teacher = True

    def __init__(self, *, weight: float, reduction: str) -> None:
        super().__init__(weight=weight)
        self.reduction = choose("reduction", reduction, "sum", "mean")

    def forward(self, step: Step) -> Tensor:
        return reduce((precise(step.student_logits) - precise(step.teacher_logits)).square(), self.reduction)
