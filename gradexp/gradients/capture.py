"""What layers compute: their outputs in a forward pass, and maps made of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradexp.base.errors import UserError, nearest


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it had.

    It calls `eval` and `train` rather than setting `training`, as some modules act there: LoRA's merge and split their weights.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with steady_statistics(model):
            yield
    finally:
        model.train(modes[model])
        for module, training in modes.items():
            module.training = training


@contextmanager
def steady_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, running statistics are copies where autograd records.

    A graph refers to them, and a later pass in train mode changes them in place, which autograd does not notice: the gradients
    would be those of other statistics than the values.
    """
    kept = [
        (module, name, value)
        for module in model.modules()
        if isinstance(module, _NormBase) and torch.is_grad_enabled()
        for name in ("running_mean", "running_var")
        if (value := getattr(module, name)) is not None
    ]
    try:
        for module, name, value in kept:
            setattr(module, name, value.clone())
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, {name: output of that module in the last forward pass}.

    Of a module that is called several times in a pass, the last call counts; `name:2` is its second. The network goes on with a
    copy, so that in-place operations behind a module do not change what was captured. Hooks are removed at exit. Raises
    UserError for a name that no module of `model` has, and for a module whose output is no tensor.
    """
    modules = dict(model.named_modules())
    for name in names:
        if module_of(name) not in modules:
            raise UserError(f"{type(model).__name__} has no layer {name}{nearest(name, modules)}")
    values, calls = dict[str, Tensor](), Counter[str]()

    def restart(*_: Any) -> None:
        calls.clear()

    def keep(name: str, _: nn.Module, __: Any, output: Any) -> Tensor | None:
        calls[name] += 1
        if ":" in name and calls[name] != int(name.partition(":")[2]):
            return None
        if not isinstance(output, Tensor):
            raise UserError(
                f"layer {name} returns a {type(output).__name__} and not a tensor; choose a layer inside or behind it"
            )
        values[name] = output
        return output.clone()

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(restart).remove)
        for name in names:
            hooks.callback(modules[module_of(name)].register_forward_hook(partial(keep, name)).remove)
        yield values


def module_of(layer: str) -> str:
    """The module of a layer such as `layer1.0.relu:1`, the first call of a module that is called several times."""
    return layer.partition(":")[0]


def attention_map(features: Tensor, power: int = 2) -> Tensor:
    """Sum over channels of squares (Eq. 2.7) or, with power=1, of absolute values (§4.4.1), at least in float32.

    (B, c, h, w) -> (B, h, w).
    """
    values = precise(features)
    return (values.abs() if power == 1 else values.square()).sum(1)


def channel_sum(values: Tensor) -> Tensor:
    """Sum over channels, at least in float32. (B, c, h, w) -> (B, h, w)."""
    return precise_sum(values, 1)


def precise_sum(values: Tensor, dim: int) -> Tensor:
    """Sum over a dimension (not counted from the end), at least in float32."""
    total: Tensor = PreciseSum.apply(values, dim)
    return total


class PreciseSum(torch.autograd.Function):
    """The backward pass of `values.sum(dim, dtype=torch.float32)` expands the gradient and then converts it, which stores it
    in contiguous layout; adding it to values in channels_last is several times slower. Here it is converted first."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        ctx.shape, ctx.dtype, ctx.dim = values.shape, values.dtype, dim
        return values.sum(dim, dtype=torch.promote_types(values.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).unsqueeze(ctx.dim).expand(ctx.shape), None


def precise(values: Tensor) -> Tensor:
    """At least float32: squares of bf16 numbers lose what a loss needs, float64 stays as it is."""
    return values if values.dtype == torch.float64 else values.float()


EXTRA_TOKENS = 8  # at most so many tokens without a place (class, registers) in front of those of a grid


def as_plane(values: Tensor, sizes: Collection[tuple[int, ...]], layout: str = "") -> Tensor | None:
    """Values over pixels or tokens as (B, c, h, w); None where they are of none of these sizes (h, w).

    layout: a letter for each dimension, of b, c, h, w and n (tokens), the images first all the same. Where it is not known,
    four dimensions are taken for (B, c, h, w) or else (B, h, w, c), and three for tokens, (B, N, c).
    """
    forms = [f"b{layout.replace('b', '')}"] if layout else ["bchw", "bhwc", "bnc"]
    for form in forms:
        if len(form) != values.ndim:
            continue
        if form == "bnc":
            return _grid_of_tokens(values, sizes)
        maps = values
        if set(form) == set("bhw"):  # without channels
            form, maps = f"bc{form[1:]}", values[:, None]
        if set(form) == set("bchw"):
            plane = maps.permute([form.index(letter) for letter in "bchw"])
            if tuple(plane.shape[2:]) in sizes:
                return plane
    return None


def _grid_of_tokens(tokens: Tensor, sizes: Collection[tuple[int, ...]]) -> Tensor | None:
    """(B, N, c) -> (B, c, h, w), of the size that leaves the fewest tokens in front of the grid, at most EXTRA_TOKENS."""
    extra = {size: tokens.shape[1] - math.prod(size) for size in sizes}
    fitting = [size for size in extra if 0 <= extra[size] <= EXTRA_TOKENS]
    if not fitting:
        return None
    size = min(fitting, key=lambda size: extra[size])
    return tokens[:, extra[size] :].transpose(1, 2).unflatten(2, size)  # type: ignore[no-untyped-call]


def halved(grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yields (h, w), (⌈h/2⌉, ⌈w/2⌉), ..., the sizes of a grid that strides of 2 leave; without (1, 1), which is no map."""
    h, w = grid
    while h * w > 1:
        yield h, w
        h, w = -(-h // 2), -(-w // 2)
