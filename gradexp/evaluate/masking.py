"""Removal of pixels by their saliency."""

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.gradients import precise
from gradexp.saliency.method import Saliency


def ranks(saliency: Tensor, *, seed: int) -> Tensor:
    """Rank of each pixel by saliency, 0 for the least salient; `seed` orders equal saliencies, alike in all images.

    saliency (B, H, W) -> integers (B, H, W), a permutation of 0 to H·W - 1 for each image.
    """
    flat = saliency.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, stable=True)]
    ascending = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ascending).view(saliency.shape)


def least_salient(ranks: Tensor, fraction: float) -> Tensor:
    """Mask of the `fraction` of pixels with the lowest ranks, for all channels: (B, H, W) -> bool (B, 1, H, W).

    The number of pixels is rounded. Raises UserError for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"removal fraction {fraction}: it must be between 0 and 1")
    return (ranks < round(fraction * ranks[0].numel()))[:, None]


def most_salient(ranks: Tensor, fraction: float) -> Tensor:
    """Mask of the `fraction` of pixels with the highest ranks, as `least_salient`."""
    return least_salient(ranks[0].numel() - 1 - ranks, fraction)


ORDERS = {"least": least_salient, "most": most_salient}


def salient_ranks(model: nn.Module, images: Tensor, method: Saliency, *, seed: int = 0) -> Tensor:
    """Rank of each pixel by the maps of a method for the predicted classes, as `ranks`: (B, C, H, W) -> (B, H, W)."""
    return ranks(method(model, images)[:, 0], seed=seed)


def salient_mask(
    model: nn.Module, images: Tensor, method: Saliency, fraction: float, *, order: str = "most", seed: int = 0
) -> Tensor:
    """Mask of the pixels that ROAR removes (§3.5.2): the `fraction` that is most or least salient, by `order`.

    images (B, C, H, W) -> bool (B, 1, H, W), for `remove`. Raises UserError for a fraction outside [0, 1].
    """
    return ORDERS[choose("order", order, *ORDERS)](salient_ranks(model, images, method, seed=seed), fraction)


FILLS = ("image_mean", "imputed")  # words for `remove`; numbers and colours are the others


def check_fill(name: str, fill: str | float | Tensor, *further: str) -> None:
    """Raises UserError for a word that is neither one of `remove` nor of `further`."""
    if isinstance(fill, str) and fill not in (*further, *FILLS):
        raise UserError(f"{name}={fill}: it must be {', '.join((*further, *FILLS))} or a number")


def remove(images: Tensor, mask: Tensor, replacement: str | float | Tensor) -> Tensor:
    """Images (B, C, H, W) whose pixels in `mask` (B, 1, H, W) are replaced.

    replacement: `image_mean` (each image's mean colour), `imputed` (see impute), a number, or a colour (C, 1, 1). Raises
    UserError for another word.
    """
    check_fill("replacement", replacement)
    if mask.dtype != torch.bool or mask.shape != (len(images), 1, *images.shape[2:]):
        wanted = (len(images), 1, *images.shape[2:])
        raise UserError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; give bool of shape {wanted}, a value for each pixel"
        )
    if replacement == "image_mean":
        return torch.where(mask, images.mean((2, 3), keepdim=True), images)
    if replacement == "imputed":
        return impute(images, mask)
    return torch.where(mask, torch.as_tensor(replacement, dtype=images.dtype, device=images.device), images)


def impute(images: Tensor, mask: Tensor, *, noise: float = 0.01, tolerance: float = 1e-4, steps: int = 2000) -> Tensor:
    """Noisy linear imputation (Rong et al., 2022, ROAD): each masked pixel becomes the weighted mean of its neighbours.

    Neighbours may be masked themselves, so a linear system is solved, by conjugate gradients. Direct neighbours weigh 1/6,
    diagonal ones 1/12; at the border, weights are divided by their sum. noise: standard deviation of Gaussian noise added to
    masked pixels, in the units of `images`, from torch's global generator. tolerance: of the residual, relative to the
    right-hand side. steps: at most. images (B, C, H, W), mask (B, 1, H, W) -> (B, C, H, W), solved in float32 at least.
    """
    given, images = images, precise(images)
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
        unsolved = size > tolerance**2 * largest  # a solved channel takes no further step, which would be 0 / 0
        if not unsolved.any():
            break
        product = mask * (weight * direction - around(direction))
        step = torch.where(unsolved, size / dot(direction, product), 0)
        values, residual = values + step * direction, residual - step * product
        size, before = dot(residual, residual), size
        direction = residual + torch.where(unsolved, size / before, 0) * direction
    return torch.where(mask, values + noise * torch.randn_like(images), images).to(given.dtype)
