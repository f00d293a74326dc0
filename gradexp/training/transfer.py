"""Training a student for other classes than its teacher's (thesis §2.5)."""

from __future__ import annotations

from gradexp.training.classifier import Classifier


class Transfer(Classifier):
    """A Classifier whose student has the target's classes and, at a second head, the teacher's.

    Where gradients are matched, of attention maps or of the teacher's outputs, it records by how much their loss fell
    (Table 2.4, §2.5.1).
    """

    def summary(self) -> dict[str, float]:
        """`train/gradient_loss_reduction`: 100 (first - last) / first of the epoch means of the gradient loss (percent)."""
        names = ("train/loss/jacobian", "train/loss/output_jacobian")
        losses = next((self.curves[name] for name in names if name in self.curves), [])
        return {"train/gradient_loss_reduction": round(100 * (1 - losses[-1] / losses[0]), 4)} if losses else {}
