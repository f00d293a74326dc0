"""Layers by their names and by their places in a network, and their biases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError, nearest
from gradexp.gradients.capture import as_plane, evaluating, halved, module_of, precise
from gradexp.gradients.operations import norm_bias
from gradexp.layers import ranks

AFFINE = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MAP_NORMS = (*NORMS, nn.GroupNorm, nn.InstanceNorm2d)  # only the bias of NORMS is known
ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign),
)


@dataclass(frozen=True)
class _Call:
    """A call of a module. before: the call of the affine module whose output a normalisation was given."""

    name: str
    module: nn.Module
    given: Tensor
    output: Tensor
    before: _Call | None = None


def effective_bias(module: nn.Module, before: nn.Module | None = None, features: Tensor | None = None) -> Tensor | None:
    """What a layer adds to its output, (c,): explicit and implicit biases merged; None where there are none.

    module: a convolution or linear layer: its bias b. A batch normalisation: beta - gamma (mean - b) / sqrt(var + eps),
    with b the bias of the layer `before` it, where given. features: that layer's output (B, c, ...), for the batch's
    statistics; running statistics without. Differentiable in all of these.
    """
    own: Tensor | None = getattr(before or module, "bias", None)
    if not isinstance(module, NORMS):
        return own
    if features is None:
        mean, variance = module.running_mean, module.running_var
    else:
        variance, mean = ranks.moments(precise(features))
    if mean is None or variance is None:
        raise UserError("a batch normalisation without running statistics has no bias of its own; give it these")
    return norm_bias(mean, variance, module.weight, module.bias, module.eps, None if before is None else own)


def biases_of(model: nn.Module) -> dict[str, Tensor]:
    """{`explicit`: all bias parameters, `implicit`: -gamma mean / sqrt(var + eps) of batch normalisations} (§3.4).

    Each (N,), of all N channels of such layers together.
    """
    explicit, implicit = [], []
    for module in model.modules():
        if isinstance(module, (*AFFINE, *NORMS)) and module.bias is not None:
            explicit.append(module.bias.detach())
        if isinstance(module, NORMS) and module.running_mean is not None and module.running_var is not None:
            gamma = module.weight.detach() if module.affine else 1
            implicit.append(-gamma * module.running_mean * torch.rsqrt(module.running_var + module.eps))
    return {name: torch.cat(values or [torch.empty(0)]) for name, values in (("explicit", explicit), ("implicit", implicit))}


def _merged(calls: Sequence[_Call]) -> list[_Call]:
    """The calls, each normalisation together with the convolution or linear layer whose output it was given."""
    affine = {id(call.output): call for call in calls if isinstance(call.module, AFFINE)}
    merged = [replace(call, before=affine.get(id(call.given))) if isinstance(call.module, NORMS) else call for call in calls]
    swallowed = {call.before.name for call in merged if call.before}
    return [call for call in merged if call.name not in swallowed]


# --- layers by their place --------------------------------------------------------------------------------

RULES = "`block 2`, `end of block 2`, `last block`, `last`, one of these and ` activation`, or the name of a module"
ACTIVATION = " activation"


class Layer(NamedTuple):
    """A layer's name, and that of the convolution in front of it where it is a normalisation (names as for `captured`)."""

    name: str
    before: str | None


def find_layer(model: nn.Module, rule: str, images: Tensor) -> Layer:
    """The layer that a rule names.

    `block N`: the first convolution of the N-th block, after its normalisation and before its activation; a block is
    what lies between two changes of the spatial size. `end of block N`: its last convolution. `last block`: the
    first convolution of the last block. `last`: the last convolution. With ` activation` behind it: the activation that
    follows this layer. Anything else is the name of a module. images (B, C, H, W): any, of the right size. Raises
    UserError when nothing matches.
    """
    merged, takers = _forward_path(model, images)
    convolutions = [call for call in merged if isinstance((call.before or call).module, nn.Conv2d)]
    blocks = [list(block) for _, block in groupby(convolutions, key=lambda call: call.output.shape[2:])]
    named = {call.name: call for call in merged}
    named |= {f"block {i}": block[0] for i, block in enumerate(blocks, start=1)}
    named |= {f"end of block {i}": block[-1] for i, block in enumerate(blocks, start=1)}
    if convolutions:
        named |= {"last block": blocks[-1][0], "last": convolutions[-1]}
    if rule in named:
        call = named[rule]
        return Layer(call.name, call.before.name if call.before else None)
    followed = named.get(rule.removesuffix(ACTIVATION))
    if followed is not None:
        if id(followed.output) not in takers:
            raise UserError(f"no module follows {followed.name} of {type(model).__name__}: choose its activation by name")
        return Layer(takers[id(followed.output)].name, None)
    modules = dict(model.named_modules())
    if rule not in modules:
        of_block = re.fullmatch(rf"(end of )?block \d+({ACTIVATION})?", rule)
        kind = f"it has {len(blocks)} blocks" if of_block else f"it is {RULES}"
        raise UserError(f"{type(model).__name__} has no layer {rule!r}: {kind}{nearest(rule, [*named, *modules])}")
    return Layer(rule, None)


def last_features(model: nn.Module, images: Tensor, smallest: int) -> str:
    """The module whose output is the map of the last convolution, behind its normalisation and its activation.

    smallest: only convolutions whose map has at least so many rows and columns. The activation is the first one behind the
    convolution whose output has the same shape: in a ResNet it follows the sum with the shortcut. Where there is none, the
    normalisation's output is the map, or the convolution's. images (B, C, H, W): any, of the right size. Raises UserError
    where no convolution has such a map.
    """
    calls = _calls(model, images, (nn.Conv2d, *MAP_NORMS, *ACTIVATIONS))
    sizes = [tuple(call.output.shape[-2:]) if isinstance(call.module, nn.Conv2d) else (0, 0) for call in calls]
    large = [i for i, size in enumerate(sizes) if min(size) >= max(1, smallest)]
    if not large:
        rows, columns = max(sizes, default=(0, 0))
        raise UserError(
            f"{type(model).__name__} has no convolution whose map has {max(1, smallest)} rows and columns or more; "
            + (f"its largest map is {rows}x{columns}" if rows else "it has no spatial features")
        )
    convolution, after = calls[large[-1]], calls[large[-1] + 1 :]
    norm = next((call for call in after[:1] if call.given is convolution.output and isinstance(call.module, MAP_NORMS)), None)
    same = [call for call in after if isinstance(call.module, ACTIVATIONS) and call.output.shape == convolution.output.shape]
    return (same or [norm or convolution])[0].name


def last_tokens(model: nn.Module, images: Tensor) -> list[str]:
    """The normalisations behind the last convolution whose outputs are tokens of a grid, the last one first.

    Tokens are (B, N, D), or (B, h, w, D) on a coarser grid than the last convolution's; none for a network without attention.
    """
    calls = _calls(model, images, (nn.Conv2d, nn.LayerNorm))
    last = max((i for i, call in enumerate(calls) if isinstance(call.module, nn.Conv2d)), default=-1)
    if last < 0:
        return []
    size = tuple(calls[last].output.shape[-2:])
    sizes = set(halved(size))
    behind = [
        call
        for call in calls[last + 1 :]
        if as_plane(call.output, sizes if call.output.ndim == 3 else sizes - {size}) is not None
    ]
    return [call.name for call in reversed(behind)]


def _calls(model: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...]) -> list[_Call]:
    """The calls of modules of these kinds in a forward pass in eval mode; names as for `captured`."""
    calls: list[_Call] = []

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, *kwargs.values()]
        if given and isinstance(output, Tensor):
            calls.append(_Call(name, module, given[0], output))

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(partial(keep, name), with_kwargs=True).remove)
            if getattr(module, "inplace", False):  # it would change what was kept
                stack.callback(setattr, module, "inplace", True)
                module.inplace = False
        model(images)
    total, count = Counter(call.name for call in calls), Counter[str]()
    for i, call in enumerate(calls):
        count[call.name] += 1
        if count[call.name] < total[call.name]:
            calls[i] = replace(call, name=f"{call.name}:{count[call.name]}")
    return calls


def _forward_path(model: nn.Module, images: Tensor) -> tuple[list[_Call], dict[int, _Call]]:
    """The layers in the order of their calls, normalisations merged with their convolutions; {id(tensor): the first call that
    takes it}."""
    leaves = tuple({type(module) for module in model.modules() if not list(module.children())})
    calls = [call for call in _calls(model, images, leaves) if not list(call.module.children())]
    takers = {id(call.given): call for call in reversed(calls)}
    return _merged([call for call in calls if isinstance(call.module, (*AFFINE, *NORMS))]), takers


def layer_bias(model: nn.Module, layer: Layer, features: Tensor | None = None) -> Tensor:
    """The effective bias of a layer, (c,). features: as for `effective_bias`. Raises UserError for one without."""
    before = model.get_submodule(module_of(layer.before)) if layer.before else None
    bias = effective_bias(model.get_submodule(module_of(layer.name)), before, features)
    if bias is None:
        raise UserError(f"layer {layer.name} has no bias; choose a layer that has one")
    return bias
