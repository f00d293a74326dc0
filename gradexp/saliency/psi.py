"""Post-processing of gradient maps: ψ of Eq. 3.2 and its choice (§3.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.saliency.method import upsample

SIGNS = ("abs", "positive", "negative")
SCALES = ("rescale", "rescale_channels")


def check(steps: Sequence[str]) -> None:
    """Raises UserError unless `steps` are at most one of SIGNS, at most one of SCALES, and `upsample`, in this order."""
    rest = list(steps)
    for optional in (SIGNS, SCALES):
        if rest and rest[0] in optional:
            del rest[0]
    if rest != ["upsample"]:
        raise UserError(
            f"saliency.psi=[{', '.join(steps)}]: it is one of {', '.join(SIGNS)} or none, then one of {', '.join(SCALES)} "
            f"or none, then upsample; the thesis's is [abs, rescale, upsample]"
        )


def psi(maps: Tensor, steps: Sequence[str], size: Sequence[int]) -> Tensor:
    """Σ_c ψ(maps_c) with ψ the composition of `steps`. (B, C, h, w) -> (B, 1, H, W).

    rescale: to [0, 1] over all channels of an image's layer, as in all released code of the author; rescale_channels: each
    channel, as Eq. 3.2 is written. Upsampling is linear, so that channels are summed before it: no tensor of C maps is ever
    made at the images' size. A constant map becomes 0.
    """
    if "abs" in steps:
        maps = maps.abs()
    elif "positive" in steps or "negative" in steps:
        maps = (maps if "positive" in steps else -maps).relu()
    if "rescale_channels" in steps:
        low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        return upsample(((maps - low) / _span(low, high)).sum(1, keepdim=True), size)
    total = maps.sum(1, keepdim=True, dtype=torch.promote_types(maps.dtype, torch.float32))
    if "rescale" in steps:
        low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
        total = (total - maps.shape[1] * low) / _span(low, high)
    return upsample(total, size)


def _span(low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high == low, torch.ones_like(high), high - low)  # NaN stays NaN
