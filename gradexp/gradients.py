"""Gradients of a classifier, at its input and at its layers: fast where they can be, differentiable where they must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradexp import layers
from gradexp.base.errors import UserError, nearest
from gradexp.layers import ranks

SCALARS = ("label", "top", "logprob")  # one number an image
TARGETS = (*SCALARS, "all")
INPUT = "input"  # the name of the images among layers


def scalar(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """The function whose gradient is taken, one value an image.

    target: `label` (logit of the correct class, §2.4.1), `top` (largest logit), `logprob` (log-probability of
    the correct class, Eq. 2.3). logits (B, K), labels (B,) -> (B,).
    """
    if target == "label":
        return logits.gather(1, labels[:, None])[:, 0]
    if target == "top":
        return logits.max(dim=1).values
    if target == "logprob":
        return logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    raise UserError(f"target={target}: it is one of {', '.join(TARGETS)}")


def gradient_of(logits: Tensor, images: Tensor, labels: Tensor, *, target: str, differentiable: bool) -> Tensor:
    """Input-gradient of logits that were computed from `images` with `images.requires_grad`.

    With `target="all"` the full Jacobian of the logits (§2.4), at K times the cost.
    -> (B, C, H, W), or (B, K, C, H, W) for `all`. The graph of `logits` stays usable.
    """
    if target == "all":
        columns = [_gradients(logits[:, k], [images], differentiable)[0] for k in range(logits.shape[1])]
        return torch.stack(columns, dim=1)
    return _gradients(scalar(logits, labels, target), [images], differentiable)[0]


def gradients_of(
    logits: Tensor, values: dict[str, Tensor], labels: Tensor, *, target: str, differentiable: bool
) -> dict[str, Tensor]:
    """Gradients of logits at several of the values they were computed from, in one backward pass.

    values: {name: (B, ...)}, on the way from the images to the logits, such as the outputs of layers. The gradient at
    a layer's output is the gradient with respect to the layer's bias, position by position. -> {name: (B, ...)}.
    """
    with torch.enable_grad():
        output = scalar(logits, labels, target)
    found = _gradients(output, list(values.values()), differentiable)
    return dict(zip(values, found, strict=True))


def gradient_of_values(values: Tensor, images: Tensor, *, differentiable: bool) -> Tensor:
    """Input-gradient of one value an image, computed from `images` with `images.requires_grad`. (B,) -> (B, C, H, W)."""
    return _gradients(values, [images], differentiable)[0]


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, target: str = "label") -> Tensor:
    """Input-gradient of `model` in its present mode, as a constant.

    images (B, C, H, W), labels (B,) -> (B, C, H, W), or (B, K, C, H, W) for `target="all"`.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return gradient_of(model(images), images, labels, target=target, differentiable=False).detach()


def loss_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Input-gradient of the cross-entropy of softmax(logits / temperature) (Eq. 5.6), as a constant. -> (B, C, H, W).

    It is Σ_j p_j (∇f_j - ∇f_y) / temperature, and computed as that. With the p_y - 1 of the ordinary form, which rounds
    where p_y is near 1, a function added to all logits would show in the gradients of confident images.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        others = (logits.detach() / temperature).softmax(1).scatter(1, labels[:, None], 0)
        loss = (others * (logits - logits.gather(1, labels[:, None]))).sum(1) / temperature
        return _gradients(loss, [images], False)[0].detach()


def taylor_trace(model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor, *, sigma: float, target: str) -> Tensor:
    """One-sample Taylor estimate of the trace of the Hessian (Eq. 5.9): 2/sigma^2 (f(x + v) - f(x)), v ~ N(0, sigma^2).

    logits = model(images); the noisy images are a second pass in the model's present mode. In train mode they have batch
    statistics of their own, so that the estimate is not that of the network in eval mode, and they enter its running
    statistics. -> (B,).
    """
    noisy = model(images + sigma * ranks.normal_like(images))
    return 2 / sigma**2 * (scalar(noisy, labels, target) - scalar(logits, labels, target))


def hutchinson_trace(gradient: Tensor, images: Tensor, *, differentiable: bool, direction: Tensor | None = None) -> Tensor:
    """One-sample estimate of the trace of the Hessian with an exact product (Hutchinson, 1990): v' H v, v ~ N(0, I).

    gradient: the differentiable input-gradient at `images`. Where batch statistics couple the images, it is that of the
    whole batch's sum, whose second derivatives are not those of an image's own output. direction: v, None to draw it. -> (B,).
    """
    direction = ranks.normal_like(images) if direction is None else direction
    return (_product(gradient, images, direction, differentiable) * direction).flatten(1).sum(1)


def exact_trace(gradient: Tensor, images: Tensor) -> Tensor:
    """The trace of the Hessian, entry by entry of the image: C·H·W backward passes, for small images only.

    gradient: the differentiable input-gradient at `images`, which no batch statistics couple. -> (B,).
    """
    entries = torch.eye(images[0].numel(), dtype=images.dtype, device=images.device).view(-1, *images.shape[1:])
    diagonal = [(_product(gradient, images, entry.expand_as(images), False) * entry).flatten(1).sum(1) for entry in entries]
    return torch.stack(diagonal).sum(0)


def check_third_derivatives(model: nn.Module) -> None:
    """Raises UserError where training through a Hessian would meet a layer that is differentiable only twice."""
    if any(type(module) is nn.BatchNorm2d for module in model.modules()):
        raise UserError(
            "the hutchinson estimator needs third derivatives, and torch's batch normalisation has two: "
            "set gradients.backend=fast, or take the taylor estimator"
        )


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between two gradients, image by image. (B, ...) and (B, ...) -> (B,)."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1), dim=1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _product(gradient: Tensor, images: Tensor, direction: Tensor, differentiable: bool) -> Tensor:
    """The Hessian times `direction` (Pearlmutter, 1994)."""
    return _gradients(gradient * direction, [images], differentiable)[0]


def _gradients(values: Tensor, inputs: Sequence[Tensor], differentiable: bool) -> tuple[Tensor, ...]:
    # The sum keeps one backward pass for the whole batch. In train mode, batch statistics couple the images:
    # this is then the gradient of the batch's sum, as in the author's code.
    with torch.enable_grad(), layers.only_inputs():
        return torch.autograd.grad(values.sum(), inputs, create_graph=differentiable, retain_graph=True)


# --- what layers compute ----------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, {name: output of that module in the last forward pass}.

    A capture's values stay what the module returned: modules that work in-place do not, inside. Hooks are removed at
    exit. Raises UserError for a name that no module of `model` has.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise UserError(f"{type(model).__name__} has no layer {name}{nearest(name, modules)}")
    values: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, __: Tensor, output: Tensor) -> None:
        values[name] = output

    with _hooked(model, {name: partial(keep, name) for name in names}):
        yield values


Hook = Callable[[nn.Module, Tensor, Tensor], None]  # module, input, output


@contextmanager
def _hooked(model: nn.Module, hooks: dict[str, Hook]) -> Iterator[None]:
    """Inside, a hook follows every call of the module with its name, and no module works in-place."""
    modules = dict(model.named_modules())
    in_place = [module for module in modules.values() if getattr(module, "inplace", False)]
    handles = [
        modules[name].register_forward_hook(lambda module, given, output, hook=hook: hook(module, given[0], output))
        for name, hook in hooks.items()
    ]
    for module in in_place:
        module.inplace = False
    try:
        yield
    finally:
        for module in in_place:
            module.inplace = True
        for handle in handles:
            handle.remove()


# --- full-gradients (Chapter 3) ---------------------------------------------------------------------------

AFFINE = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CURVED = (nn.Softplus, nn.GELU, nn.SiLU, nn.ELU, nn.Sigmoid, nn.Tanh)  # elementwise
# f(kx) = k f(x) for k > 0: no bias, neither explicit nor implicit. Dropout in eval mode.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Sequential, nn.Flatten, nn.Dropout, nn.Dropout2d)
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardswish, *CURVED)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class FullGradient:
    """The full-gradient of Proposition 6, image by image.

    images (B, C, H, W), output (B,), input: input-gradient (B, C, H, W), biases: {layer: bias-gradient f^b, that is
    bias times gradient, (B, c, h, w) or (B, c)}, gradients: {layer: the gradient alone}. curved: the layers that are
    activations with an implicit bias.
    """

    images: Tensor
    output: Tensor
    input: Tensor
    biases: dict[str, Tensor]
    gradients: dict[str, Tensor]
    curved: tuple[str, ...] = ()

    def total(self) -> Tensor:
        """Input term plus all bias terms: the output (Eq. 3.1). (B,)."""
        terms = [self.input * self.images, *self.biases.values()]
        return torch.stack([term.flatten(1).sum(1) for term in terms]).sum(0)

    def error(self) -> Tensor:
        """How far `total` is from the output, relative to it. (B,)."""
        return (self.total() - self.output).abs() / self.output.abs()


@dataclass(frozen=True)
class _Call:
    """A module with a bias at work. `before`: the call of the affine module whose output a normalisation was given."""

    name: str
    module: nn.Module
    given: Tensor
    output: Tensor
    before: _Call | None = None

    def bias(self, differentiable: bool) -> Tensor | None:
        """Shaped to multiply the gradient at the output; None where there is none."""
        if isinstance(self.module, CURVED):  # linearised at its input: b = y - s(z) z (§3.4)
            slope = torch.autograd.grad(self.output.sum(), self.given, create_graph=differentiable, retain_graph=True)[0]
            return self.output - slope * self.given
        bias = effective_bias(self.module, self.before.module if self.before else None)
        return None if bias is None else bias.view(-1, *[1] * (self.output.dim() - 2))


def effective_bias(module: nn.Module, before: nn.Module | None = None, features: Tensor | None = None) -> Tensor | None:
    """What a layer adds to its output, (C,): explicit and implicit biases merged; None where there are none.

    module: a convolution or linear layer: its bias b. A batch normalisation: beta - gamma (mean - b) / sqrt(var + eps),
    with b the bias of the layer `before` it, where given. features: that layer's output (B, C, ...), for the batch's
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
    shift = mean if before is None or own is None else mean - own
    gamma, beta = (module.weight, module.bias) if module.affine else (1, 0)
    return beta - gamma * shift * torch.rsqrt(variance + module.eps)


def biases_of(model: nn.Module) -> dict[str, Tensor]:
    """{`explicit`: all bias parameters, `implicit`: -gamma mean / sqrt(var + eps) of batch normalisations} (§3.4). (N,)."""
    explicit, implicit = [], []
    for module in model.modules():
        if isinstance(module, (*AFFINE, *NORMS)) and module.bias is not None:
            explicit.append(module.bias.detach())
        if isinstance(module, NORMS) and module.running_mean is not None and module.running_var is not None:
            gamma = module.weight.detach() if module.affine else 1
            implicit.append(-gamma * module.running_mean * torch.rsqrt(module.running_var + module.eps))
    return {name: torch.cat(values or [torch.empty(0)]) for name, values in (("explicit", explicit), ("implicit", implicit))}


def full_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    target: str = "label",
    separate: bool = False,
    differentiable: bool = False,
) -> FullGradient:
    """Input-gradient and every layer's bias-gradient of `model`, in eval mode, in one backward pass (§3.4).

    Biases are explicit (convolution, linear layer) and implicit (batch normalisation, curved activations). A
    normalisation and the layer in front of it share one map, under the name of the normalisation; `separate` keeps a
    map a module. A module that is called again counts as `name:2`. The sum over everything is exact for
    `target="label"` and `"top"`. differentiable: with the graph for a further backward pass.
    Raises UserError for a model in train mode, and for a layer whose bias is not known.
    """
    if model.training:
        raise UserError("full-gradients are those of a model in eval mode: call model.eval()")
    _check_known(model)
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits, calls = _called(model, images)
        if not separate:
            calls = _merged(calls)
        biases = {call.name: call.bias(differentiable) for call in calls}
        values = {INPUT: images} | {call.name: call.output for call in calls}
        found = gradients_of(logits, values, labels, target=target, differentiable=differentiable)
        maps = {name: found[name] * bias for name, bias in biases.items() if bias is not None}
        output = scalar(logits, labels, target)
    at_input = found.pop(INPUT)
    curved = tuple(call.name for call in calls if isinstance(call.module, CURVED))
    if differentiable:
        return FullGradient(images, output, at_input, maps, found, curved)
    maps = {name: map.detach() for name, map in maps.items()}
    return FullGradient(images.detach(), output.detach(), at_input, maps, found, curved)


def _called(model: nn.Module, images: Tensor) -> tuple[Tensor, list[_Call]]:
    """Logits, and the calls of all modules with a bias, in order."""
    calls: list[_Call] = []

    def keep(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        again = sum(call.module is module for call in calls)
        calls.append(_Call(f"{name}:{again + 1}" if again else name, module, given, output))

    biased = {name: module for name, module in model.named_modules() if isinstance(module, (*AFFINE, *NORMS, *CURVED))}
    with _hooked(model, {name: partial(keep, name) for name in biased}):
        return model(images), calls


def _check_known(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, (*AFFINE, *NORMS, *CURVED, *HOMOGENEOUS, *POOLS)):
            raise UserError(
                f"the bias of a {type(module).__name__} ({name}) is not known to gradexp/gradients.py; add it there"
            )


def _merged(calls: Sequence[_Call]) -> list[_Call]:
    """The calls, each normalisation together with the convolution or linear layer whose output it was given."""
    affine = {id(call.output): call for call in calls if isinstance(call.module, AFFINE)}
    merged: list[_Call] = []
    swallowed: set[str] = set()
    for call in calls:
        before = affine.get(id(call.given)) if isinstance(call.module, NORMS) else None
        if before is not None:
            swallowed.add(before.name)
        merged.append(replace(call, before=before))
    return [call for call in merged if call.name not in swallowed]


# --- layers by their place --------------------------------------------------------------------------------

RULES = "`block 2`, `end of block 2`, `last block`, `last`, one of these and ` activation`, or the name of a module"
ACTIVATION = " activation"


class Layer(NamedTuple):
    """A layer's name, and that of the convolution in front of it where it is a normalisation."""

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
    blocks = [list(block) for _, block in groupby(convolutions, key=_size)]
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
    calls: list[_Call] = []
    wanted = (nn.Conv2d, *NORMS, *ACTIVATIONS)

    def keep(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        calls.append(_Call(name, module, given, output))

    hooks: dict[str, Hook] = {name: partial(keep, name) for name, module in model.named_modules() if isinstance(module, wanted)}
    with evaluating(model), torch.no_grad(), _hooked(model, hooks):
        model(images)
    sizes = [tuple(call.output.shape[-2:]) if isinstance(call.module, nn.Conv2d) else (0, 0) for call in calls]
    large = [i for i, size in enumerate(sizes) if min(size) >= max(1, smallest)]
    if not large:
        rows, columns = max(sizes, default=(0, 0))
        raise UserError(
            f"{type(model).__name__} has no convolution whose map has {max(1, smallest)} rows and columns or more; "
            + (f"its largest map is {rows}x{columns}" if rows else "it has no spatial features")
        )
    convolution, after = calls[large[-1]], calls[large[-1] + 1 :]
    norm = next((call for call in after[:1] if call.given is convolution.output and isinstance(call.module, NORMS)), None)
    same = [call for call in after if isinstance(call.module, ACTIVATIONS) and call.output.shape == convolution.output.shape]
    return (same or [norm or convolution])[0].name


class _Taker(NamedTuple):
    """The first module that takes a tensor."""

    name: str
    given: Tensor  # kept: the id of a tensor that is gone becomes another's


def _forward_path(model: nn.Module, images: Tensor) -> tuple[list[_Call], dict[int, _Taker]]:
    """The layers in the order of their calls, normalisations merged with their convolutions; {id(tensor): its taker}."""
    takers = dict[int, _Taker]()
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}

    def take(name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        takers.setdefault(id(given), _Taker(name, given))

    with evaluating(model), torch.no_grad(), _hooked(model, {name: partial(take, name) for name in leaves}):
        _, calls = _called(model, images)
    return _merged(calls), takers


def layer_bias(model: nn.Module, layer: Layer, features: Tensor | None = None) -> Tensor:
    """The effective bias of a layer, (c,). features: as for `effective_bias`. Raises UserError for one without."""
    before = model.get_submodule(layer.before) if layer.before else None
    bias = effective_bias(model.get_submodule(layer.name), before, features)
    if bias is None:
        raise UserError(f"layer {layer.name} has no bias; choose a layer that has one")
    return bias


def _size(call: _Call) -> torch.Size:
    return call.output.shape[2:]


def attention_map(features: Tensor, power: int = 2) -> Tensor:
    """Sum over channels of squares (Eq. 2.7) or, with power=1, of absolute values (§4.4.1), at least in float32.

    (B, c, h, w) -> (B, h, w).
    """
    values = precise(features)
    return (values.abs() if power == 1 else values.square()).sum(1)


def channel_sum(values: Tensor) -> Tensor:
    """Sum over channels, at least in float32. (B, c, h, w) -> (B, h, w)."""
    return values.sum(1, dtype=values.dtype if values.dtype == torch.float64 else torch.float32)


def precise(values: Tensor) -> Tensor:
    """At least float32: squares of bf16 numbers lose what a loss needs, float64 stays as it is."""
    return values if values.dtype == torch.float64 else values.float()
