import torch
from torch import Tensor

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, NonNegative
from gradexp.gradients import SCALARS, precise
from gradexp.terms.step import Step
from gradexp.terms.term import Term


def corner(side: int, images: Tensor) -> Tensor:
    """The mask of Figure 5.5a: 1 in the side x side pixels at the top left. images (B, C, H, W) -> (H, W)."""
    height, width = images.shape[-2:]
    if not 0 < side <= min(height, width):
        raise UserError(f"mask={side}: images have {height}x{width} pixels; take a side from 1 to {min(height, width)}")
    mask = torch.zeros(height, width, dtype=images.dtype, device=images.device)
    mask[:side, :side] = 1
    return mask


class Fooling(Term):
    """Squared distance of the normalised saliency to a normalised mask (Eq. 5.7; Heo et al., 2019).

    Saliency: the input-gradient's magnitude summed over channels, which sums to 1 over the image; so does the mask.
    mask: its side in pixels. target: whose gradient; student_bn: `batch` or `running`. Mean over the batch.
    """

    def __init__(self, *, weight: NonNegative, mask: Count, target: str, student_bn: str) -> None:
        super().__init__(weight=weight)
        self.mask = mask
        self.target = self.gradient_target = choose("target", target, *SCALARS)
        self.student_bn = choose("student_bn", student_bn, "batch", "running")

    def forward(self, step: Step) -> Tensor:
        size = precise(step.student_input_gradient(self.target, self.student_bn)).abs().sum(1)
        saliency = size / size.sum((1, 2), keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        mask = corner(self.mask, step.images)
        return (saliency - mask / mask.sum()).square().flatten(1).sum(1).mean()
