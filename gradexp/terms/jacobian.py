import torch
from torch import Tensor

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import TARGETS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class Jacobian(Term):
    """Squared distance of student's and teacher's input-gradients (Proposition 1, second term).

    target: whose gradient (§2.4.1); `top` is the teacher's largest logit in both networks, `all` the full Jacobian of
    Proposition 1. reduction: `sum` or `mean` over pixels (and classes), or `norm`, the root of the sum: the distance
    itself, unsquared; mean over the batch. student_bn: `batch` or `running` statistics. head: the student's layer that
    has the teacher's classes, instead of its logits (LwF, §2.5.1); no label names one of these, so `target` is `top`.
    """

    needs_teacher = True

    def __init__(self, *, weight: NonNegative, reduction: str, target: str, student_bn: str, head: str | None = None) -> None:
        super().__init__(weight=weight)
        if head and target != "top":
            raise UserError(
                f"target={target}: head={head} has the teacher's classes, and labels are of others; take target=top"
            )
        self.student_layers = (head,) if head else ()
        self.reduction = choose("reduction", reduction, "sum", "mean", "norm")
        self.target = self.gradient_target = choose("target", target, *TARGETS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        difference = precise(self._student_gradient(step)) - precise(step.teacher_input_gradient(self.target))
        if self.reduction == "norm":
            return torch.linalg.vector_norm(difference.flatten(1), dim=1).mean()
        return reduce(difference.square(), self.reduction)

    def _student_gradient(self, step: Step) -> Tensor:
        if not self.student_layers:
            return step.student_input_gradient(self.target, self.student_bn)
        top = step.teacher_logits.argmax(dim=1, keepdim=True)
        return step.student_feature_gradient(self.student_layers[0], lambda head: head.gather(1, top)[:, 0], self.student_bn)
