"""Batch normalisation, differentiable twice at first-order cost, and any number of times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradexp.layers.backward import aligned, computed, left_to_torch, visible, wants_parameters

_batch_norm_backward = torch.ops.aten.native_batch_norm_backward


class NormaliseBatch(Function):
    """Batch normalisation by the batch's own statistics; running statistics are updated in place.

    x (B, C, H, W), w and b (C,) -> y, mean (C,), inverse standard deviation (C,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, running: tuple[Any, Any], momentum: float, eps: float) -> Any:
        y, mean, inverse = torch.native_batch_norm(x, w, b, *running, True, momentum, eps)
        ctx.save_for_backward(x, w, mean, inverse)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, inverse)
        return y, mean, inverse

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> Any:
        x, w, mean, inverse = ctx.saved_tensors
        gx, gw, gb = BatchNormInput.apply(aligned(g, x), x, w, mean, inverse, ctx.eps)
        if not wants_parameters():
            gw = gb = None
        elif torch.is_grad_enabled():  # somebody differentiates these too: rare, so autograd may do it
            gw, gb = (g * _normalised(x, ctx.eps)[0]).sum((0, 2, 3)), g.sum((0, 2, 3))
        return gx, gw, gb, None, None, None


class BatchNormInput(Function):
    """Gradient of NormaliseBatch: with x̂ the normalised input, a = w / std and ⟨·⟩ the mean over a channel,

        gx = a P(g),   P(g) = g - ⟨g⟩ - x̂ ⟨g x̂⟩.

    P is symmetric, so the derivative of gx with respect to g is gx's own kernel once more: gg = a P(v) for a
    cotangent v. The derivative with respect to x is then a combination of tensors that are there already,

        -inverse (⟨g x̂⟩ gg + ⟨v x̂⟩ gx + a K x̂),   K = ⟨v P(g)⟩ = ⟨v g⟩ - ⟨v⟩⟨g⟩ - ⟨v x̂⟩⟨g x̂⟩.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Any:
        gx, gw, gb = _batch_norm_backward(g, x, w, None, None, mean, inverse, True, eps, [True, True, True])
        ctx.save_for_backward(g, gx, x, w, mean, inverse, gw, gb)
        ctx.eps = eps
        ctx.mark_non_differentiable(gw, gb)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> Any:
        if torch.is_grad_enabled():  # a third derivative is wanted: rare, so autograd may do it
            g, _, x, w, *_ = ctx.saved_tensors
            return *_batch_norm_input_backward(v, g, x, w, ctx.eps), None, None, None
        g, gx, x, w, mean, inverse, gw, gb = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        gg, sum_vx, sum_v = _batch_norm_backward(v, x, w, None, None, mean, inverse, True, ctx.eps, [True, True, True])
        k = (_dot(v, g, w) - (sum_v * gb + sum_vx * gw) / count) / count
        second = _centred(x, mean, -w * inverse.pow(3) * k)
        second.addcmul_(gg, _wide(-inverse * gw / count, x)).addcmul_(gx, _wide(-inverse * sum_vx / count, x))
        return gg, second, count * k * inverse, None, None, None


def _batch_norm_input_backward(v: Tensor, g: Tensor, x: Tensor, w: Tensor, eps: float) -> list[Tensor | None]:
    """What BatchNormInput.backward computes, in operations that autograd differentiates any number of times."""

    g, x, w = (tensor.view_as(tensor) for tensor in (g, x, w))  # g may itself come from x: partial derivatives are meant
    normalised, inverse = _normalised(x, eps)
    gx = w.view(-1, 1, 1) * inverse * (g - _mean(g) - normalised * _mean(g * normalised))
    wanted = [tensor for tensor in (g, x, w) if tensor.requires_grad]
    found = iter(torch.autograd.grad(gx, wanted, v, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in (g, x, w)]


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std and 1 / std, channel by channel."""
    centred = x - _mean(x)
    inverse = torch.rsqrt(_mean(centred.square()) + eps)
    return centred * inverse, inverse


def _mean(values: Tensor) -> Tensor:
    return values.mean((0, 2, 3), keepdim=True)


# Two sums over channels in one pass each: batch normalisation's own kernels read bf16 tensors beside fp32 channels,
# where plain operations would write whole tensors in between.


def _dot(first: Tensor, second: Tensor, w: Tensor) -> Tensor:
    """Sum of first * second over all but the channels. (B, C, H, W) twice -> (C,), in the precision of w (C,)."""
    zero, one = torch.zeros_like(w), torch.ones_like(w)
    return _batch_norm_backward(first, second, one, None, None, zero, one, True, 0.0, [False, True, False])[1]


def _centred(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """scale * (x - mean), channel by channel."""
    one = torch.ones_like(mean)
    return torch.native_batch_norm(x, scale, None, mean, one, False, 0.0, 0.0)[0]


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, 1, 1).to(like.dtype)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, differentiable twice at first-order cost, and any number of times (the stock layer: twice)."""

    @property
    def is_fast(self) -> bool:
        """Whether it does not fall back to torch's function, as without parameters, running statistics or a momentum."""
        return self.affine and self.running_mean is not None and self.momentum is not None

    def forward(self, input: Tensor) -> Tensor:
        mean, variance, seen = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.is_fast or mean is None or variance is None or seen is None:
            return super().forward(input)
        if left_to_torch(input) or computed(self.weight, self.bias) or not len(input):
            return super().forward(input)
        if input.shape[1] != self.num_features:  # torch says what is wrong
            return super().forward(input)
        if self.training:
            if input.numel() == input.shape[1]:  # as the stock layer; the running variance would become NaN
                raise ValueError(f"batch normalisation in training needs more than one value per channel: {tuple(input.shape)}")
            seen.add_(1)
            y: Tensor = NormaliseBatch.apply(input, self.weight, self.bias, (mean, variance), self.momentum, self.eps)[0]
            return y
        return normalise(input, self.weight, self.bias, mean, variance, self.eps)


@visible
def normalise(input: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    """Batch normalisation by running statistics. input (B, C, H, W), the others (C,)."""
    scale = weight * torch.rsqrt(running_var + eps)
    shift = bias - running_mean * scale
    # The channels' numbers stay in their own precision: rounded to bf16 first, they would triple the error.
    return torch.addcmul(shift.view(-1, 1, 1), input, scale.view(-1, 1, 1)).to(input.dtype)
