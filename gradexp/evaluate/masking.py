"""Which pixels a saliency map removes, and what takes their place."""

import torch
from torch import Tensor

from gradexp.errors import UserError


def ranks(saliency: Tensor, *, seed: int) -> Tensor:
    """The place of each pixel when they are ordered by saliency, 0 for the least salient; ties fall as `seed` has it.

    saliency (B, H, W) -> (B, H, W) integers below H·W, each once an image.
    """
    flat = saliency.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, stable=True)]
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view(saliency.shape)


def least_salient(ranks: Tensor, fraction: float) -> Tensor:
    """Mask of the `fraction` of pixels with the lowest ranks, the same for all channels. (B, H, W) -> bool (B, 1, H, W)."""
    if not 0 <= fraction <= 1:
        raise UserError(f"removal fraction {fraction}: it lies between 0 and 1")
    return (ranks < round(fraction * ranks[0].numel()))[:, None]


def most_salient(ranks: Tensor, fraction: float) -> Tensor:
    """Mask of the `fraction` of pixels with the highest ranks, likewise."""
    return least_salient(ranks[0].numel() - 1 - ranks, fraction)


def remove(images: Tensor, mask: Tensor, replacement: str | float | Tensor) -> Tensor:
    """`images` (B, C, H, W) with the masked pixels replaced: by each image's mean colour (`image_mean`), by a number,
    or by a colour (C, 1, 1)."""
    if replacement == "image_mean":
        return torch.where(mask, images.mean((2, 3), keepdim=True), images)
    if isinstance(replacement, str):
        raise UserError(f"replacement={replacement}: it is image_mean or a number")
    return torch.where(mask, torch.as_tensor(replacement, dtype=images.dtype, device=images.device), images)
