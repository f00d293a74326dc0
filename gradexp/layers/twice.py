"""Layers that torch differentiates once, in a form that it differentiates twice."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradexp.layers.backward import visible


class Hardsigmoid(nn.Hardsigmoid):
    """nn.Hardsigmoid, whose own backward has no derivative."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input)


@visible
def hardsigmoid(input: Tensor) -> Tensor:
    return functional.hardtanh(input + 3, 0.0, 6.0) / 6


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention by plain products: the fused kernels' backward has no derivative."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(*args, **kwargs)
