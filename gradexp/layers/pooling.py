"""Max-pooling, differentiable twice at first-order cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from gradexp.layers.backward import left_to_torch, visible


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
    batch, channels, height, width = indices.shape
    return flat.gather(1, at).view(batch, height, width, channels).permute(0, 3, 1, 2)


class MaxPool(nn.MaxPool2d):
    """nn.MaxPool2d, differentiable twice at first-order cost."""

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices or left_to_torch(input):
            return super().forward(input)
        size = tuple(_pair(value) for value in (self.kernel_size, self.stride, self.padding, self.dilation))
        return max_pool(input, (*size, self.ceil_mode))


@visible
def max_pool(x: Tensor, size: tuple[Any, ...]) -> Tensor:
    y: Tensor = Pool.apply(x, size)
    return y


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
