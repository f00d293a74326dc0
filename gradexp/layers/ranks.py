"""A batch shared out among processes: what each must know so that together they compute what one would.

Losses are means over the whole batch, batch statistics are the whole batch's, and noise is drawn for the whole batch and
cut. Every exchange is differentiable any number of times, and its derivative sums over the processes too: a gradient that
a process takes of its own images' scalars is that of all processes' scalars, as batch statistics demand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from gradexp.base.errors import UserError
from gradexp.layers.batch_norm import normalise


class Share(NamedTuple):
    """Of a batch of `total` images, this process has those from number `start` on."""

    start: int
    total: int


_share: Share | None = None  # None: this process has the whole batch


def world() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return world() == 1 or distributed.get_rank() == 0


@contextmanager
def sharing(share: Share | None) -> Iterator[None]:
    """Inside, batches are what `share` says; None for whole ones."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def part(x: Tensor) -> float:
    """Which part of the whole batch this process's images x (B, ...) are."""
    return 1.0 if _share is None else len(x) / _share.total


class _Sum(Function):
    """The sum over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient)


def total(values: Tensor) -> Tensor:
    """The sum over processes, differentiable; `values` itself where there is one process."""
    summed: Tensor = values if world() == 1 else _Sum.apply(values)
    return summed


def sum_of(number: float) -> float:
    """The sum over processes of what is no tensor."""
    if world() == 1:
        return number
    numbers: list[Any] = [None] * world()
    distributed.all_gather_object(numbers, number, group=_control())
    return float(sum(numbers))


def any_of(decision: bool) -> bool:
    """Whether any of the processes decided so. All must call it; none returns before all have."""
    if world() == 1:
        return decision
    flag = torch.tensor(int(decision))
    distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=_control())
    return bool(flag)


_group: Any = None


def _control() -> Any:
    """Processes that agree on the CPU need not wait for their GPUs."""
    global _group
    if _group is None:
        _group = distributed.new_group(backend="gloo")
    return _group


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance (biased) and mean of each channel over the whole batch, differentiable. (B, C, ...) -> (C,), (C,)."""
    channels = x.transpose(0, 1).flatten(1)
    if _share is None:
        return torch.var_mean(channels, dim=1, correction=0)
    channels = channels if channels.dtype == torch.float64 else channels.float()
    count = batch_size(x) * channels.shape[1] // len(x)
    mean = total(channels.sum(1)) / count
    return total((channels - mean[:, None]).square().sum(1)) / count, mean


def batch_size(x: Tensor) -> int:
    """How many images the whole batch has. x (B, ...): this process's."""
    return len(x) if _share is None else _share.total


def normal_like(images: Tensor) -> Tensor:
    """This process's part of the standard normal noise that one process would draw for the whole batch. (B, ...)."""
    return _drawn(images, torch.randn_like)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """functional.dropout with this process's part of the mask that one process would draw for the whole batch."""
    if _share is None or not training:
        return functional.dropout(x, probability, training)
    return x * _drawn(x, lambda whole: functional.dropout(torch.ones_like(whole), probability))


def _drawn(x: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
    if _share is None:
        return draw(x)
    # In the same memory layout: it decides which number goes where.
    whole = x.detach()[:1].expand(_share.total, *x.shape[1:]).clone(memory_format=_layout(x))
    return draw(whole)[_share.start : _share.start + len(x)]


def _layout(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class Dropout(nn.Dropout):
    """nn.Dropout with the whole batch's mask."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d with the whole batch's statistics, differentiable any number of times.

    torch's own SyncBatchNorm has one derivative, and input-gradients that are trained need two.
    """

    def forward(self, input: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None and self.num_batches_tracked is not None and self.momentum is not None
        if self.training:
            count = batch_size(input) * input[0, 0].numel()
            if count == 1:  # as the stock layer
                raise ValueError("batch normalisation in training needs more than one value per channel")
            var, now = moments(input)
            self.num_batches_tracked.add_(1)
            mean.lerp_(now.detach().to(mean.dtype), self.momentum)
            variance.lerp_(var.detach().to(variance.dtype) * count / (count - 1), self.momentum)
            mean, variance = now, var
        return normalise(input, self.weight, self.bias, mean, variance, self.eps)


def share_layers(model: nn.Module) -> nn.Module:
    """Makes the layers of `model` that look at a whole batch do so across processes, in place. Returns `model`.

    Raises UserError for a layer that would look at the images of one process only.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine and module.track_running_stats and module.momentum is not None:
            module.__class__ = BatchNorm
        elif type(module) is nn.Dropout:
            module.__class__ = Dropout
        elif isinstance(module, _BatchNorm | _DropoutNd):
            raise UserError(
                f"layer {name}, {type(module).__name__}, can't share a batch among processes: use nn.BatchNorm2d with "
                f"parameters and running statistics, and nn.Dropout, or train in one process (trainer.devices=1)"
            )
    return model
