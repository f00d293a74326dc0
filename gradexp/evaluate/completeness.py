"""Completeness of full-gradients (Proposition 6)."""

from __future__ import annotations

from torch import Tensor, nn

from gradexp.saliency import FullGrad


def completeness_error(
    model: nn.Module, images: Tensor, method: FullGrad | None = None, target: Tensor | int | None = None
) -> Tensor:
    """|sum of all full-gradients - f(x)| / |f(x)| (Eq. 3.1). images (B, C, H, W) -> (B,).

    method: whose full-gradients; None for FullGrad(). target: the class, None for the predicted one.
    """
    return (method or FullGrad()).completeness_error(model, images, target)
