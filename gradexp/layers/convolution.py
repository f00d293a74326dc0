"""Convolution, differentiable any number of times at first-order cost.

y = x * w is linear in x and in w. So each of its three products (output, input-gradient, weight-gradient) has the other two
as its derivatives, and the three Functions below close the family.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from gradexp.layers import dense, winograd
from gradexp.layers.backward import computed, left_to_torch, visible, wants_parameters

_convolution_backward = torch.ops.aten.convolution_backward

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
    """Gradients for x, w and the bias, None where `mask` asks for none. Only w's reads x; the others need its shape."""
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
        if not torch.is_grad_enabled() and wants_parameters():
            return *_kernel(g, x, w, ctx.shape, [needs_x, needs_w, needs_b]), None
        gx = ConvolutionInput.apply(g, w, x.detach(), ctx.shape) if needs_x else None
        gw = ConvolutionWeight.apply(g, x, w.detach(), ctx.shape) if needs_w and wants_parameters() else None
        gb = g.sum((0, 2, 3)) if needs_b and wants_parameters() else None
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
        gw = ConvolutionWeight.apply(g, v, w.detach(), ctx.shape) if needs_w and wants_parameters() else None
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

    channels_last = True  # its layout on a CPU

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or left_to_torch(input):
            return super().forward(input)
        if computed(self.weight, self.bias):
            return super().forward(input)
        if self.channels_last and input.device.type == "cpu":  # outputs have this layout too: one copy serves a network
            input = input.contiguous(memory_format=torch.channels_last)
        x, w, b = _autocast(input, self.weight, self.bias)
        return convolve(x, w, b, (self.stride, self.padding, self.dilation, self.groups))


@visible
def convolve(x: Tensor, w: Tensor, b: Tensor | None, shape: Shape) -> Tensor:
    y: Tensor = Convolve.apply(x, w, b, shape)
    return y


def _autocast(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would have done to the arguments of a stock convolution."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, w, b
    dtype = torch.get_autocast_dtype(device)
    x, w = (each if each.dtype == torch.float64 else each.to(dtype) for each in (x, w))
    return x, w, b if b is None or b.dtype == torch.float64 else b.to(dtype)
