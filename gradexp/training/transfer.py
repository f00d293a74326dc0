"""Training a student for other classes than its teacher's (thesis §2.5)."""

from __future__ import annotations

from gradexp.training.classifier import Classifier


class Transfer(Classifier):
    """A Classifier whose student has the target's classes and, at a second head, the teacher's.

    Where gradients are matched, it records by how much their loss fell (Table 2.4).
    """

    def summary(self) -> dict[str, float]:
        """`train/gradient_loss_reduction`: 100 (first - last) / first of the epoch means of the gradient loss (percent)."""
        losses = self.curves.get("train/loss/jacobian", [])
        return {"train/gradient_loss_reduction": round(100 * (1 - losses[-1] / losses[0]), 4)} if losses else {}
