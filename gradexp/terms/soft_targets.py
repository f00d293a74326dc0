from torch import Tensor

from gradexp.base.ranges import NonNegative, Positive, require
from gradexp.gradients import precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class SoftTargets(Term):
    """Cross-entropy of the student's softened outputs with the teacher's (Hinton et al., 2015; Eq. 2.2, first term).

    temperature: T, which divides the logits of both networks before the softmax. The factor T² keeps the size of the gradient:
    for large T it tends to that of ‖difference of centred logits‖² / 2K. Sum over the K classes; mean over the batch.
    Raises UserError for a temperature that is not positive.
    """

    needs_teacher = True

    def __init__(self, *, weight: NonNegative, temperature: Positive) -> None:
        super().__init__(weight=weight)
        require(Positive, temperature=temperature)
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        student, teacher = (precise(logits) / self.temperature for logits in (step.student_logits, step.teacher_logits))
        return -(self.temperature**2) * (teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
