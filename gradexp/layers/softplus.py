"""Softplus, differentiable twice at first-order cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from gradexp.layers.backward import aligned, visible

_softplus_backward = torch.ops.aten.softplus_backward


class ApplySoftplus(Function):
    """log(1 + exp(beta x)) / beta, elementwise; the identity where beta x is beyond the threshold."""

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
    """Gradient of ApplySoftplus: gx = g s with s = sigmoid(beta x), or 1 beyond the threshold.

    The slope of s is beta s (1 - s), so that for a cotangent v, with gg = v s, the derivative with respect to x is
    beta v g s (1 - s) = beta gx (v - gg): s itself is never written down.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
        gx: Tensor = _softplus_backward(g, x, beta, threshold)
        ctx.save_for_backward(g, x, gx)
        ctx.constants = (beta, threshold)
        return gx

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x, gx = ctx.saved_tensors
        beta, threshold = ctx.constants
        if torch.is_grad_enabled():  # a third derivative is wanted, so s must be a function of x
            s = torch.sigmoid(beta * x).masked_fill(beta * x > threshold, 1)
            return v * s, beta * v * g * s * (1 - s), None, None
        v = aligned(v, x)
        gg = _softplus_backward(v, x, beta, threshold)
        return gg, (v - gg).mul_(gx).mul_(beta), None, None


class Softplus(nn.Softplus):
    """nn.Softplus, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.compiler.is_compiling() else softplus(input, self.beta, self.threshold)


@visible
def softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    y: Tensor = ApplySoftplus.apply(x, beta, threshold)
    return y
