import torch
from torch import Tensor

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import NonNegative
from gradexp.gradients import TARGETS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term, reduce


class Jacobian(Term):
    """Squared distance between the input-gradients of student and teacher (Proposition 1, second term; J of Table 2.1).

    target: the output whose gradient is taken, see gradients.scalar: `all` is the proposition's full Jacobian, the others
    approximate it (§2.4.1); `top` is the teacher's largest logit, for both networks.
    The proposition's σ² is the weight. Gradients are (B, C, H, W), for `all` (B, K, C, H, W).
    reduction: `sum` (the proposition's) or `mean` over pixels (and classes), or `norm`, the distance unsquared (§4.4.1); mean
    over the batch. student_bn: the student's batch normalisation uses `batch` or `running` statistics.
    head: a layer of the student that has the teacher's classes, used instead of its logits (LwF, §2.5.1); labels are of other
    classes, so `target` must be `top`; UserError otherwise.
    """

    needs_teacher = True

    def __init__(self, *, weight: NonNegative, reduction: str, target: str, student_bn: str, head: str | None = None) -> None:
        super().__init__(weight=weight)
        if head and target != "top":
            raise UserError(f"target={target}: head={head} has the teacher's classes, not the labels'; take target=top")
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
