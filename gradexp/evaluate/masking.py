"""Which pixels a saliency map removes, and what takes their place."""

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError


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
    """`images` (B, C, H, W) with the masked pixels (B, 1, H, W) replaced: by each image's mean colour (`image_mean`), by
    what surrounds them (`imputed`), by a number, or by a colour (C, 1, 1)."""
    if replacement == "image_mean":
        return torch.where(mask, images.mean((2, 3), keepdim=True), images)
    if replacement == "imputed":
        return impute(images, mask)
    if isinstance(replacement, str):
        raise UserError(f"replacement={replacement}: it is image_mean, imputed or a number")
    return torch.where(mask, torch.as_tensor(replacement, dtype=images.dtype, device=images.device), images)


def impute(images: Tensor, mask: Tensor, *, noise: float = 0.01, tolerance: float = 1e-4, steps: int = 2000) -> Tensor:
    """Noisy linear imputation (Rong et al., 2022, ROAD): each masked pixel is the weighted mean of its neighbours.

    Masked neighbours too, so that a linear system is solved, by conjugate gradients. A pixel at one's side counts twice as
    much as one at a corner; at the border those that there are share the weight. noise: standard deviation of what is
    added to masked pixels, in the units of `images`, from torch's generator. tolerance: of the residual, relative to the
    right-hand side; steps: at most. images (B, C, H, W), mask (B, 1, H, W) -> as images.
    """
    kernel = images.new_tensor([[1, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12

    def around(values: Tensor) -> Tensor:
        """The weighted sum of each pixel's neighbours."""
        flat = values.flatten(0, 1)[:, None]
        return nn.functional.conv2d(flat, kernel[None, None], padding=1).view(values.shape)

    def dot(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum((2, 3), keepdim=True)

    weight = around(torch.ones_like(images))
    residual = mask * around(images.where(~mask, 0))
    values, direction = torch.zeros_like(images), residual
    size = largest = dot(residual, residual)
    for _ in range(steps):
        unsolved = size > tolerance**2 * largest  # a channel that is solved stands still: its next step would be 0 / 0
        if not unsolved.any():
            break
        product = mask * (weight * direction - around(direction))
        step = torch.where(unsolved, size / dot(direction, product), 0)
        values, residual = values + step * direction, residual - step * product
        size, before = dot(residual, residual), size
        direction = residual + torch.where(unsolved, size / before, 0) * direction
    return torch.where(mask, values + noise * torch.randn_like(images), images)
