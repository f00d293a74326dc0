from torch import Tensor
from torch.nn import functional

from gradexp.gradients import precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class CrossEntropy(Term):
    """Cross-entropy of the logits with the true labels (CE of §2.12.2); mean over the batch."""

    def forward(self, step: Step) -> Tensor:
        return functional.cross_entropy(precise(step.student_logits), step.labels)
