"""Full-gradients (Chapter 3): the input-gradient and the bias-gradients of all operations of any network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from gradexp.base.errors import UserError
from gradexp.gradients.capture import as_plane, halved, steady_statistics
from gradexp.gradients.inputs import (
    SCALARS,
    check_classes,
    checked_images,
    checked_labels,
    checked_logits,
    differentiable_anyway,
    fitting,
    gradient_of,
    scalar,
)
from gradexp.gradients.operations import Operations


@dataclass(frozen=True)
class FullGradient:
    """The full-gradient of Proposition 6, image by image.

    images (B, C, H, W), output (B,), input: input-gradient (B, C, H, W). biases: {operation: bias-gradient f^b, that is bias
    times gradient}, gradients: {operation: the gradient alone}, both (B, ...). nonlinear: operations that are no convolution,
    linear layer or batch normalisation. layouts: {operation: that of its output, as letters for the dimensions}, of maps and
    tokens. grids: sizes (h, w) of the network's maps. linear: Σ_k z_k ∂output/∂z_k over the logits z, to which everything sums
    up; None where it is the output, which is a logit. (B,).
    """

    images: Tensor
    output: Tensor
    input: Tensor
    biases: dict[str, Tensor]
    gradients: dict[str, Tensor]
    nonlinear: frozenset[str] = frozenset()
    layouts: Mapping[str, str] = field(default_factory=dict)
    grids: frozenset[tuple[int, ...]] = frozenset()
    linear: Tensor | None = None

    def total(self) -> Tensor:
        """Input term plus all bias terms: the output (Eq. 3.1), or its `linear` part. (B,)."""
        return torch.stack(self._sums).sum(0)

    def error(self) -> Tensor:
        """Absolute difference of `total` from `expected`, relative to the latter. (B,)."""
        return self.relative(self.total() - self.expected).abs()

    def relative(self, values: Tensor) -> Tensor:
        """`values` divided by `expected`; where that is 0, 0 for a value of 0, and infinite for others. (B,)."""
        return torch.where(values == 0, 0, values / self.expected)

    def planes(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Those of `values` (default: the bias-gradients) of maps and token grids, as (B, c, h, w)."""
        sizes = {tuple(self.images.shape[-2:])}.union(*map(halved, self.grids))
        values = self.biases if values is None else values
        planes = {name: as_plane(values[name], sizes, layout) for name, layout in self.layouts.items() if name in values}
        return {name: plane for name, plane in planes.items() if plane is not None}

    def outside(self) -> Tensor:
        """The part of `total` whose bias-gradients have no spatial location: those of linear layers, class tokens. (B,)."""
        planes, total = self.planes(), torch.zeros_like(_sum(self.input))
        for name, values in self.biases.items():
            if name not in planes:
                total = total + _sum(values)
            elif planes[name].numel() < values.numel():  # class tokens in front of a grid
                total = total + _sum(values) - _sum(planes[name])
        return total

    def inexact(self) -> Tensor:
        """Whether `total` misses what it should be by more than rounding explains; (B,) bool."""
        magnitude = torch.stack([values.abs() for values in (*self._sums, self.expected)]).sum(0)
        difference = (self.total() - self.expected).abs()
        return self.expected.isfinite() & ~(difference <= magnitude * torch.finfo(self.expected.dtype).eps ** 0.5)

    @property
    def expected(self) -> Tensor:
        """What `total` is but for rounding: the output, or its `linear` part. (B,)."""
        return self.output if self.linear is None else self.linear

    @cached_property
    def _sums(self) -> list[Tensor]:
        return [_sum(values) for values in [self.input * self.images, *self.biases.values()]]


def full_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | int,
    *,
    target: str = "label",
    separate: bool = False,
    differentiable: bool = False,
) -> FullGradient:
    """Input-gradient and bias-gradients of all operations of `model`, in eval mode, in one backward pass (§3.4).

    Any network of torch functions: the biases are those of `gradexp.gradients.operations`. An operation is named by its
    module, and by its function where the module has several; the second call of a module is `name:2`. A batch normalisation
    and the layer in front of it share one bias, under the name of the normalisation; `separate` keeps both. The sum over
    everything is the output, exactly, for `target="label"` and `"top"`, which ignores `labels`; for `"logprob"`, which is not
    linear in the logits z, it is z_label - Σ_k p_k z_k with the probabilities p. images (B, C, H, W), labels (B,) or one
    class for all, the classes that are explained. differentiable: with the graph for a further backward pass. Works under
    `no_grad`, `inference_mode` and autocast.

    Raises UserError for images or labels that don't fit, for a model in train mode, for an operation whose bias can't be
    computed, and where the output of an image depends on the others of its batch; warns where the sum differs from the output
    by more than rounding explains.
    """
    model = plain(model)
    if target not in SCALARS:
        raise UserError(f"target={target}: full-gradients have one of {', '.join(SCALARS)}")
    if training := [name for name, module in model.named_modules() if module.training]:
        raise UserError(
            f"full-gradients are those of a model in eval mode, {training[0] or 'it'} is in train mode: call model.eval()"
        )
    with _exact(model), steady_statistics(model) if differentiable else nullcontext():
        images = checked_images(images).requires_grad_()
        labels = checked_labels(labels, images)
        full = _decomposed(model, images, labels, target, separate, differentiable)
        if full is None or (len(images) > 1 and full.inexact().any()):
            # Images may share an axis with something else, such as windows or tokens in front of the batch.
            parts = [
                _decomposed(model, images[i : i + 1], labels[i : i + 1], target, separate, differentiable)
                for i in range(len(images))
            ]
            full = _joined(images if differentiable else images.detach(), [part for part in parts if part is not None])
            _check_independent(model, images, labels, target, full)
    if full.inexact().any():
        largest = sorted(full.biases, key=lambda name: -float(_sum(full.biases[name]).abs().max()))[:3]
        warnings.warn(
            f"the full-gradients of {type(model).__name__} sum up to {full.total().tolist()} and not to "
            f"{full.expected.tolist()}, in {full.output.dtype}; the largest terms are those of {', '.join(largest)}",
            stacklevel=2,
        )
    return full


def plain(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel. Raises UserError for what is no network."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}; give a network (nn.Module)")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Inside, all operations have derivatives of all kinds: no inference mode, no fused attention, nothing compiled."""
    with ExitStack() as stack:
        stack.enter_context(differentiable_anyway())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _decomposed(
    model: nn.Module, images: Tensor, labels: Tensor, target: str, separate: bool, differentiable: bool
) -> FullGradient | None:
    """The full-gradient, by one backward pass; None where it is not clear which part of it belongs to which image."""
    with closing(Operations(model, images, differentiable=differentiable)) as met:
        with met.recording(), fitting(model, images):
            logits = checked_logits(model(images.clone()))  # which the model may change in place
        met.check_seen(logits)
        if target != "top":
            check_classes(labels, logits)
        at_input = gradient_of(logits, images, labels, target=target, differentiable=differentiable)
        operations = [each for each in (met.all if separate else met.merged(logits)) if each.gradient is not None]
    biases, gradients = dict[str, Tensor](), dict[str, Tensor]()
    for operation in operations:
        assert operation.gradient is not None
        slope = _by_image(operation.gradient, len(images))
        if slope is None:
            return None
        gradients[operation.name] = slope
        if operation.bias is not None:
            # torch's gradient at a complex y is df/dRe(y) + i df/dIm(y), so that the real part is the sum over both.
            in_place = operation.kind == "other" and not differentiable  # the bias is the operation's own, and as large
            multiply = operation.bias.mul_ if in_place else operation.bias.mul
            product = _by_image(multiply(operation.gradient.conj()).real, len(images))
            assert product is not None
            biases[operation.name] = product
    output = scalar(logits, labels, target)
    nonlinear = frozenset(operation.name for operation in operations if operation.kind == "other")
    layouts = {operation.name: operation.layout for operation in operations if operation.layout}
    linear = _linear_part(logits, labels, target) if target == "logprob" else None
    full = FullGradient(images, output, at_input, biases, gradients, nonlinear, layouts, frozenset(met.grids), linear)
    return full if differentiable else _constant(full)


def _linear_part(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """Σ_k z_k ∂s/∂z_k of the scalar s that is explained, over the logits z. (B, K) -> (B,)."""
    logits = logits.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(scalar(logits, labels, target).sum(), logits)
    return (slopes * logits.detach()).sum(1)


def _check_independent(model: nn.Module, images: Tensor, labels: Tensor, target: str, alone: FullGradient) -> None:
    """Raises UserError where complete full-gradients of single images are those of other outputs than the batch has."""
    with torch.no_grad():
        together = scalar(checked_logits(model(images.clone())), labels, target)
    tolerance = torch.finfo(together.dtype).eps ** 0.5 * together.nan_to_num().abs().max()
    differs = (together - alone.output).abs() > tolerance
    if differs.any() and not alone.inexact().any():
        raise UserError(
            f"the output of {type(model).__name__} for an image depends on the others of its batch, as with batch statistics: "
            f"give it one image at a time, or its normalisations running statistics (track_running_stats=True)"
        )


def _constant(full: FullGradient) -> FullGradient:
    biases = {name: values.detach() for name, values in full.biases.items()}
    return replace(full, images=full.images.detach(), output=full.output.detach(), biases=biases)


def _joined(images: Tensor, parts: Sequence[FullGradient]) -> FullGradient:
    """The full-gradients of single images as those of the batch `images`."""
    gradients = _joined_by_name([part.gradients for part in parts])
    layouts = {name: layout for part in parts for name, layout in part.layouts.items()}
    return FullGradient(
        images=images,
        output=torch.cat([part.output for part in parts]),
        input=torch.cat([part.input for part in parts]),
        biases=_joined_by_name([part.biases for part in parts]),
        gradients=gradients,
        nonlinear=frozenset[str]().union(*(part.nonlinear for part in parts)),
        layouts={name: layout for name, layout in layouts.items() if gradients[name].ndim == len(layout)},
        grids=parts[0].grids,
        linear=None if parts[0].linear is None else torch.cat([part.linear for part in parts if part.linear is not None]),
    )


def _joined_by_name(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The values of all images by the names of operations; 0 for an image whose forward pass did without an operation.

    Values that differ in size, as those of an operation on the pixels or tokens that a network selects, are flattened and
    filled up with zeros: (B, n).
    """
    every: dict[str, Tensor] = {}
    for part in parts:
        every |= part
    joined = dict[str, Tensor]()
    for name, some in every.items():
        values = [part.get(name, torch.zeros_like(some)) for part in parts]
        alike = all(each.shape == some.shape for each in values)
        joined[name] = torch.cat(values) if alike else pad_sequence([each.flatten() for each in values], batch_first=True)
    return joined


def _by_image(values: Tensor, batch: int) -> Tensor | None:
    """With the images first: (B, ...), (N, B, ...) and (B N, ...) -> (B, ...). None for anything else."""
    if values.ndim and len(values) == batch:
        return values
    if values.ndim > 1 and values.shape[1] == batch:
        return values.movedim(1, 0)
    if batch == 1:
        return values[None]
    return values.unflatten(0, (batch, -1)) if values.ndim and len(values) % batch == 0 else None  # type: ignore[no-untyped-call]


def _sum(values: Tensor) -> Tensor:
    """(B, ...) -> (B,), at least in float32."""
    # Not flattened, which copies a tensor in channels_last.
    return values[..., None].sum(tuple(range(1, values.ndim + 1)), dtype=torch.promote_types(values.dtype, torch.float32))
