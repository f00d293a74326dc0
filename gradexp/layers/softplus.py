"""Softplus, differentiable twice at first-order cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from gradexp.layers.backward import aligned

ROUNDS_TO_1 = 18  # sigmoid(18) is 1 in float32


class ApplySoftplus(Function):
    """log(1 + exp(beta x)) / beta, elementwise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float, threshold: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = (beta, threshold)
        return functional.softplus(x, beta, threshold)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return SoftplusInput.apply(aligned(g, x), x, *ctx.constants), None, None


class SoftplusInput(Function):
    """Gradient of ApplySoftplus: g s with s = sigmoid(beta x), whose own slope is beta s (1 - s).

    Beyond the threshold torch's softplus is the identity, so s is 1 there.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
        s = torch.mul(x, beta).sigmoid_()
        if threshold < ROUNDS_TO_1 or x.dtype == torch.float64:
            s.masked_fill_(x > threshold / beta, 1)
        ctx.save_for_backward(g, x, s)
        ctx.constants = (beta, threshold)
        return g * s

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x, s = ctx.saved_tensors
        beta, threshold = ctx.constants
        if torch.is_grad_enabled():  # a third derivative is wanted, so s must be a function of x again
            s = torch.sigmoid(beta * x).masked_fill(x > threshold / beta, 1)
            return v * s, beta * v * g * s * (1 - s), None, None
        return v * s, torch.ops.aten.sigmoid_backward(v * g, s).mul_(beta), None, None


class Softplus(nn.Softplus):
    """nn.Softplus, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        return ApplySoftplus.apply(input, self.beta, self.threshold)
