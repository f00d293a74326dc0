"""Transfer learning: the student's classes are not the teacher's (§2.5)."""

from __future__ import annotations

from gradexp.training.classifier import Classifier


class Transfer(Classifier):
    """A Classifier whose student has a head for its own classes and one for the teacher's (LwF).

    Where gradients of attention maps or of the teacher's outputs are matched, it records how far their loss fell (Table 2.4).
    """

    def summary(self) -> dict[str, float]:
        """`train/gradient_loss_reduction`: 100 (first - last) / first, in percent, of the gradient loss's means over passes."""
        names = ("train/loss/jacobian", "train/loss/output_jacobian")
        losses = next((self.curves[name] for name in names if name in self.curves), [])
        return {"train/gradient_loss_reduction": round(100 * (1 - losses[-1] / losses[0]), 4)} if losses else {}
