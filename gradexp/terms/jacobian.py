import torch
from torch import Tensor

from gradexp.errors import choose
from gradexp.gradients import TARGETS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class Jacobian(Term):
    """Squared distance of student's and teacher's input-gradients (Proposition 1, second term).

    target: whose gradient (§2.4.1); `top` is the teacher's largest logit in both networks, `all` the full Jacobian of
    Proposition 1. reduction: `sum` or `mean` over pixels (and classes), or `norm`, the root of the sum: the distance
    itself, unsquared; mean over the batch. student_bn: `batch` or `running` statistics.
    """

    needs_teacher = True

    def __init__(self, *, weight: float, reduction: str, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.reduction = choose("reduction", reduction, "sum", "mean", "norm")
        self.target = self.gradient_target = choose("target", target, *TARGETS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        student = step.student_input_gradient(self.target, self.student_bn)
        teacher = step.teacher_input_gradient(self.target)
        difference = precise(student) - precise(teacher)
        if self.reduction == "norm":
            return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()
        return reduce(difference.square(), self.reduction)
