from collections.abc import Sequence

import torch
from torch import Tensor

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, NonNegative, require
from gradexp.gradients import SCALARS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term


class Fooling(Term):
    """Squared distance between the normalised saliency s and a normalised mask m (Eq. 5.7; Heo et al., 2019).

    s: unsigned_saliency of the input-gradient. m: corner, divided by its sum. Sum over pixels; mean over the batch.
    mask: side of the square in pixels. target: the output whose gradient is taken, see gradients.scalar.
    student_bn: batch normalisation uses `batch` or `running` statistics. Raises UserError for a mask larger than the images.
    """

    def __init__(self, *, weight: NonNegative, mask: Count, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        require(Count, mask=mask)
        self.mask = mask
        self.target = self.gradient_target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        saliency = unsigned_saliency(precise(step.student_input_gradient(self.target, self.student_bn)))
        mask = corner(self.mask, step.images.shape[-2:], step.images.device).to(step.images.dtype)
        return (saliency - mask / mask.sum()).square().flatten(1).sum(1).mean()


def unsigned_saliency(gradient: Tensor) -> Tensor:
    """Magnitude of a gradient, summed over channels and divided by its sum over pixels (§5.7.2). (B, C, H, W) -> (B, H, W)."""
    magnitude = gradient.abs().sum(1)
    return magnitude / magnitude.sum((1, 2), keepdim=True).clamp(min=torch.finfo(magnitude.dtype).tiny)


def corner(side: int, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """The mask of Figure 5.5a, of `size` (H, W): 1 in the top left square of `side` pixels, 0 elsewhere.

    Raises UserError for a square larger than the mask.
    """
    height, width = size
    if not 0 < side <= min(height, width):
        raise UserError(f"mask={side}: images have {height}x{width} pixels; take a side from 1 to {min(height, width)}")
    mask = torch.zeros(height, width, device=device)
    mask[:side, :side] = 1
    return mask
