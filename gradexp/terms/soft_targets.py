from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.base.ranges import NonNegative, Positive
from gradexp.gradients import precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class SoftTargets(Term):
    """Cross-entropy of the student's softened outputs with the teacher's (Hinton et al., 2015; Eq. 2.2, first term).

    temperature: T, which divides both networks' logits before the softmax. The term is multiplied by T², so that its
    gradient keeps its size: for a large T it is that of squared logits, centred, over 2K. Mean over the batch.
    """

    needs_teacher = True

    def __init__(self, *, weight: NonNegative, temperature: Positive) -> None:
        super().__init__(weight=weight)
        if temperature <= 0:
            raise UserError(f"temperature={temperature:g}: it divides logits; give a positive number")
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        student, teacher = (precise(logits) / self.temperature for logits in (step.student_logits, step.teacher_logits))
        return -(self.temperature**2) * (teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
