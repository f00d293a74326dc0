from torch import Tensor

from gradexp.base.errors import choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class Activations(Term):
    """Squared distance between the logits of student and teacher (Proposition 1, first term; A of Table 2.1).

    reduction: `sum` (the proposition's) or `mean` over the K classes; mean over the batch.
    head: a layer of the student whose output is matched instead of its logits, for a teacher with other classes (LwF, §2.5).
    """

    needs_teacher = True

    def __init__(self, *, weight: NonNegative, reduction: str, head: str | None = None) -> None:
        super().__init__(weight=weight)
        self.student_layers = (head,) if head else ()
        self.reduction = choose("reduction", reduction, "sum", "mean")

    def forward(self, step: Step) -> Tensor:
        student = step.student_features(self.student_layers[0]) if self.student_layers else step.student_logits
        return reduce((precise(student) - precise(step.teacher_logits)).square(), self.reduction)
