"""Layers whose backward pass can itself be differentiated at first-order cost.

A gradient penalty differentiates an input-gradient. With stock layers that second backward runs through generic
code several times slower than an ordinary one. Here the backward of every layer is a function of its own, whose
backward in turn uses nothing but the fast first-order kernels. Counting convolutions, a step that matches
input-gradients costs

    forward 1, input-gradient 1, backward of the input-gradient 2, backward of the forward 2  =  6

against 3 for a cross-entropy step: a factor of 2.

`accelerate(model)` gives a model's layers these backward passes; values, parameters and state stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from gradexp import dense, winograd

_convolution_backward = torch.ops.aten.convolution_backward
_batch_norm_backward = torch.ops.aten.native_batch_norm_backward

_only_inputs = False


@contextmanager
def only_inputs() -> Iterator[None]:
    """Inside, backward passes skip the gradients of parameters: they are on no path to the input.

    Autograd knows this of its own nodes, but does not tell it to a Function. Not reentrant across threads.
    """
    global _only_inputs
    before, _only_inputs = _only_inputs, True
    try:
        yield
    finally:
        _only_inputs = before


def _aligned(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory layout of x. Global pooling hands down gradients in another one, and kernels are slow on a mix."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return g.contiguous(memory_format=layout)


# --- convolution ------------------------------------------------------------------------------------------
# y = x * w is linear in x and in w. So each of its three products (output, input-gradient, weight-gradient) has
# the other two as its derivatives, and the three Functions below close the family.

Shape = tuple[Any, ...]  # stride, padding, dilation, groups


SAME: Shape = ((1, 1), (1, 1), (1, 1), 1)


def _faster(x: Tensor, w: Tensor, shape: Shape) -> ModuleType | None:
    """The module whose `convolve`, `input_gradient` and `weight_gradient` beat torch's kernels here, if there is one.

    They do the 3 x 3 convolutions that keep a map's size, on a CPU, in fp32 and channels_last.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    if w.shape[2:] != (3, 3) or shape != SAME:
        return None
    return next((module for module in (dense, winograd) if module.suits(x, w)), None)


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, shape: Shape) -> Tensor:
    faster = _faster(x, w, shape)
    if faster is None:
        return torch.conv2d(x, w, b, *shape)
    y: Tensor = faster.convolve(x, w)
    return y if b is None else y.add_(b.view(-1, 1, 1))


def _kernel(g: Tensor, x: Tensor, w: Tensor, shape: Shape, mask: list[bool]) -> tuple[Any, Any, Any]:
    """Gradients for x, w and the bias: those that `mask` asks for, None for the others. Of x, only the shape without w's."""
    wants_x, wants_w, wants_b = mask
    if faster := _faster(x, w, shape):
        gx = faster.input_gradient(g, w) if wants_x else None
        gw = faster.weight_gradient(g, x) if wants_w else None
        return gx, gw, g.sum((0, 2, 3)) if wants_b else None
    stride, padding, dilation, groups = shape
    if by_matmul := wants_w and _small_maps(g, x, shape):
        mask = [wants_x, False, False]  # asked for the bias alone, the kernel would do the weights' work too
    gx, gw, gb = _convolution_backward(g, x, w, [w.shape[0]], stride, padding, dilation, False, [0, 0], groups, mask)
    if by_matmul:
        gw, gb = _weight_by_matmul(g, x, w, shape), g.sum((0, 2, 3)) if wants_b else None
    return gx, gw, gb


SMALL_MAP = 16  # pixels: measured from 2 x 2 to 32 x 32, at batches of 8 to 128


def _small_maps(g: Tensor, x: Tensor, shape: Shape) -> bool:
    """Where one matrix product beats the CPU's kernel for the weight-gradient: 2 to 11 times, up to 4 x 4 pixels.

    Beyond, the copy of every window costs more than it saves; bf16 has kernels of its own.
    """
    _, _, dilation, groups = shape
    plain = groups == 1 and tuple(dilation) == (1, 1) and x.dtype in (torch.float32, torch.float64)
    return plain and x.device.type == "cpu" and g.shape[2] * g.shape[3] <= SMALL_MAP


def _weight_by_matmul(g: Tensor, x: Tensor, w: Tensor, shape: Shape) -> Tensor:
    """The weight-gradient as (output-gradients)^T (windows of x): (O, B H' W') times (B H' W', k k C)."""
    (down, across), (top, left), *_ = shape
    out_channels, channels, height, width = w.shape
    windows = functional.pad(x, (left, left, top, top)).unfold(2, height, down).unfold(3, width, across)
    columns = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, height * width * channels)
    rows = g.permute(0, 2, 3, 1).reshape(-1, out_channels)
    return (rows.t() @ columns).view(out_channels, height, width, channels).permute(0, 3, 1, 2)


class Convolve(Function):
    """x (B, C, H, W), w (O, C/groups, k, k), b (O,) or None -> (B, O, H', W')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, shape: Shape) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.shape = shape
        return _convolve(x, w, b, shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        needs_x, needs_w, needs_b, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled() and not _only_inputs:
            return *_kernel(g, x, w, ctx.shape, [needs_x, needs_w, needs_b]), None
        gx = ConvolutionInput.apply(g, w, x.detach(), ctx.shape) if needs_x else None
        gw = ConvolutionWeight.apply(g, x, w.detach(), ctx.shape) if needs_w and not _only_inputs else None
        gb = g.sum((0, 2, 3)) if needs_b and not _only_inputs else None
        return gx, gw, gb, None


class ConvolutionInput(Function):
    """Gradient of Convolve with respect to x: linear in the output-gradient g and in w. `like` has x's shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, w: Tensor, like: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(g, w)
        ctx.shape = shape
        return _kernel(g, like, w, shape, [True, False, False])[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, w = ctx.saved_tensors
        needs_g, needs_w, *_ = ctx.needs_input_grad
        gg = Convolve.apply(v, w, None, ctx.shape) if needs_g else None
        gw = ConvolutionWeight.apply(g, v, w.detach(), ctx.shape) if needs_w and not _only_inputs else None
        return gg, gw, None, None


class ConvolutionWeight(Function):
    """Gradient of Convolve with respect to w: linear in the output-gradient g and in x. `like` has w's shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, like: Tensor, shape: Shape) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.shape = shape
        return _kernel(g, x, like, shape, [False, True, False])[1]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        g, x = ctx.saved_tensors
        needs_g, needs_x, *_ = ctx.needs_input_grad
        gg = Convolve.apply(x, v, None, ctx.shape) if needs_g else None
        gx = ConvolutionInput.apply(g, v, x.detach(), ctx.shape) if needs_x else None
        return gg, gx, None, None


class Convolution(nn.Conv2d):
    """nn.Conv2d, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super().forward(input)
        x, w, b = _autocast(input, self.weight, self.bias)
        return Convolve.apply(x, w, b, (self.stride, self.padding, self.dilation, self.groups))


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """What autocast would have done to the arguments of a stock convolution."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


# --- batch normalisation ----------------------------------------------------------------------------------


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
        gx, gw, gb = BatchNormInput.apply(_aligned(g, x), x, w, mean, inverse, ctx.eps)
        if _only_inputs:
            gw = gb = None
        elif torch.is_grad_enabled():  # somebody differentiates these too: rare, so autograd may do it
            normalised = functional.batch_norm(x, None, None, None, None, True, 0.0, ctx.eps)
            gw, gb = (g * normalised).sum((0, 2, 3)), g.sum((0, 2, 3))
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

    def mean(values: Tensor) -> Tensor:
        return values.mean((0, 2, 3), keepdim=True)

    g, x, w = (tensor.view_as(tensor) for tensor in (g, x, w))  # g may itself come from x: partial derivatives are meant
    inverse = torch.rsqrt((x - mean(x)).square().mean((0, 2, 3), keepdim=True) + eps)
    normalised = (x - mean(x)) * inverse
    gx = w.view(-1, 1, 1) * inverse * (g - mean(g) - normalised * mean(g * normalised))
    wanted = [tensor for tensor in (g, x, w) if tensor.requires_grad]
    found = iter(torch.autograd.grad(gx, wanted, v, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in (g, x, w)]


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

    def forward(self, input: Tensor) -> Tensor:
        mean, variance, seen = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or variance is None or seen is None or not self.affine or self.momentum is None:
            return super().forward(input)
        if self.training:
            seen.add_(1)
            y: Tensor = NormaliseBatch.apply(input, self.weight, self.bias, (mean, variance), self.momentum, self.eps)[0]
            return y
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        # The channels' numbers stay in their own precision: rounded to bf16 first, they would triple the error.
        return torch.addcmul(shift.view(-1, 1, 1), input, scale.view(-1, 1, 1)).to(input.dtype)


# --- max-pooling ------------------------------------------------------------------------------------------


class Pool(Function):
    """Max-pooling: picks the entries at `indices`, so its backward puts them there, and that one's picks them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: tuple[Any, ...]) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, *size)
        ctx.save_for_backward(x, indices)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, indices = ctx.saved_tensors
        return Unpool.apply(g, x.detach(), indices, ctx.size), None


class Unpool(Function):
    """Gradient of Pool: linear in g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, indices: Tensor, size: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(indices)
        return torch.ops.aten.max_pool2d_with_indices_backward(g, x, *size, indices)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return _pick(v, indices), None, None, None


def _pick(values: Tensor, indices: Tensor) -> Tensor:
    """values (B, C, H, W) at flat positions (B, C, h, w), without a copy in either memory layout."""
    if not indices.is_contiguous(memory_format=torch.channels_last):
        return values.flatten(2).gather(2, indices.flatten(2)).view_as(indices)
    flat, at = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (values, indices))
    batch, _, height, width = indices.shape
    return flat.gather(1, at).view(batch, height, width, -1).permute(0, 3, 1, 2)


class MaxPool(nn.MaxPool2d):
    """nn.MaxPool2d, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices:
            return super().forward(input)
        size = tuple(_pair(value) for value in (self.kernel_size, self.stride, self.padding, self.dilation))
        return Pool.apply(input, (*size, self.ceil_mode))


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


# --- softplus ---------------------------------------------------------------------------------------------


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
        return SoftplusInput.apply(_aligned(g, x), x, *ctx.constants), None, None


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


ROUNDS_TO_1 = 18  # sigmoid(18) is 1 in float32


class Softplus(nn.Softplus):
    """nn.Softplus, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        return ApplySoftplus.apply(input, self.beta, self.threshold)


# --- models -----------------------------------------------------------------------------------------------

FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Convolution,
    nn.BatchNorm2d: BatchNorm,
    nn.MaxPool2d: MaxPool,
    nn.Softplus: Softplus,
}

# Stock layers whose double backward is first-order work already.
PLAIN = (nn.ReLU, nn.Linear, nn.Dropout, nn.Identity, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def accelerate(model: nn.Module) -> nn.Module:
    """Gives the layers of `model` fast double backward passes, in place; layers it does not know keep autograd's.

    The layers' classes change, their parameters, buffers, hooks and names do not. Returns `model`.
    """
    unknown: set[str] = set()
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
        elif not list(module.children()) and type(module) not in (*FAST.values(), *PLAIN):
            unknown.add(type(module).__name__)
    if unknown:
        logging.getLogger(__name__).warning(
            "autograd's own double backward for %s: exact, but slower", ", ".join(sorted(unknown))
        )
    return model
