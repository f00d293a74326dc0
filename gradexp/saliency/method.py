"""What all saliency methods have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import require_fields
from gradexp.gradients.inputs import NO_PATH, fitting

UNITS = ("normalised", "raw")
CAUSES = "look at the model's weights (did its training diverge?) and at the images for NaN or infinity"


@dataclass(frozen=True, kw_only=True)
class Saliency(ABC):
    """One number per pixel: how much it matters to an output of the model.

    black: what a black pixel is after the data's normalisation, a number or (C, 1, 1). std: what pixels in [0, 1] were
    divided by, likewise.
    """

    black: Tensor | float = 0.0
    std: Tensor | float = 1.0

    def __new__(cls, *given: Any, **_: Any) -> Any:
        if given:
            raise UserError(
                f"{cls.__name__} takes settings by their names, and then the network: {cls.__name__}()(model, images)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("black", "std"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() > 1 and value.ndim < 3:  # which would be taken for rows or columns
                raise UserError(f"{type(self).__name__}: {name} has shape {tuple(value.shape)}; give a number, or (C, 1, 1)")

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor | int | None = None) -> Tensor:
        """images (B, C, H, W), target: the class to explain, one for all or (B,); None for the predicted one.

        -> (B, 1, H, W), constant. The model is in eval mode meanwhile, and left as it was. Stochastic methods draw
        from torch's generator. Raises UserError for a target out of range, images that do not fit the model, and a
        map that is not finite.
        """
        with explaining(model, images, target) as (model, labels):
            saliency = self.map(model, gradients.constant(images), labels).detach()
        expected = (len(images), 1, *images.shape[-2:])
        if tuple(saliency.shape) != expected:
            raise UserError(f"{type(self).__name__}: map returned {tuple(saliency.shape)}, expected (B, 1, H, W) = {expected}")
        if not saliency.isfinite().all():
            raise UserError(f"{type(self).__name__}: the map is not finite; {CAUSES}")
        return saliency

    @abstractmethod
    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        """(B, 1, H, W); labels (B,), or None for the predicted classes. The model is in eval mode."""


@contextmanager
def explaining(model: nn.Module, images: Tensor, target: Tensor | int | None) -> Iterator[tuple[nn.Module, Tensor | None]]:
    """Yields the model without wrappers such as DataParallel, and labels (B,), None for a target of None.

    Inside, the model is in eval mode and autograd records; the model is given copies of its inputs, and its outputs must be
    logits (B, K) with a class for each label. Raises UserError for images or a target that do not fit.
    """
    model = gradients.plain(model)
    with ExitStack() as stack:
        stack.enter_context(gradients.differentiable_anyway())
        labels = checked(images, target)
        if "ScriptModule" in type(model).__name__:
            raise UserError("the model is TorchScript, which can't be looked into: give its source")
        stack.enter_context(gradients.evaluating(model))
        if model._compiled_call_impl:  # model.compile() would keep the hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(fitting(model, images))
        stack.enter_context(model.register_forward_pre_hook(_cloned))
        stack.enter_context(model.register_forward_hook(partial(_check_output, labels)))
        yield model, labels


def checked(images: Tensor, target: Tensor | int | None) -> Tensor | None:
    """`target` as (B,) labels. Raises UserError for images or a target of another form."""
    images = gradients.checked_images(images)
    if images.ndim != 4 or not len(images):
        raise UserError(f"images are {tuple(images.shape)}; a saliency method takes (B, C, H, W) with B of at least 1")
    return None if target is None else gradients.checked_labels(target, images)


def _cloned(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in inputs)


def _check_output(labels: Tensor | None, model: nn.Module, inputs: Any, output: Any) -> None:
    logits = gradients.checked_logits(output)
    differentiable = any(isinstance(each, Tensor) and each.requires_grad for each in inputs)
    if torch.is_grad_enabled() and differentiable and not logits.requires_grad:
        raise UserError(NO_PATH)
    if logits.isnan().any():
        raise UserError(f"the model returns NaN; {CAUSES}")
    if labels is not None:
        gradients.check_classes(labels, logits)


def predicted(model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """`labels`, or the predicted classes where there are none; (B,)."""
    if labels is not None:
        return labels
    with torch.no_grad():
        return gradients.checked_logits(model(images)).argmax(1)


def value_range(images: Tensor, units: str, method: Saliency) -> Tensor:
    """The range of values of each image, of which SmoothGrad's sigma is a fraction; 1 for a constant image.

    units: `normalised`: largest minus smallest value of the normalised image, over all channels: (B, 1, 1, 1). `raw`: the
    range of its pixels in [0, 1], in the units of each normalised channel: (B, C, 1, 1). The two differ because channels
    are shifted and divided by numbers of their own; without normalisation they are the same.
    """
    if units not in UNITS:
        raise UserError(f"saliency.units={units}: it is one of {', '.join(UNITS)}")
    std = torch.as_tensor(method.std, dtype=images.dtype, device=images.device)
    values = images if units == "normalised" else (images - method.black) * std
    span = (values.flatten(1).amax(1) - values.flatten(1).amin(1)).view(-1, 1, 1, 1)
    span = torch.where(span > 0, span, torch.ones_like(span))
    return span if units == "normalised" else span / std.expand(images.shape[1], 1, 1)


def over_channels(values: Tensor, how: str) -> Tensor:
    """(B, C, H, W) -> (B, 1, H, W). how: `abs` (sum of absolute values), `sum` (signed), `square`, `std`."""
    if how == "abs":
        return values.abs().sum(1, keepdim=True)
    if how == "sum":
        return values.sum(1, keepdim=True)
    if how == "square":
        return values.square().sum(1, keepdim=True)
    if how == "std":
        return values.std(1, correction=0, keepdim=True)
    raise UserError(f"channels={how}: it is one of abs, sum, square, std")


def upsample(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear, to the images' size. (B, C, h, w) -> (B, C, H, W)."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
