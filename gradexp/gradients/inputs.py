"""Gradients of a classifier with respect to its input and to values on the way, and traces of its Hessian."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gradexp import layers
from gradexp.base.errors import UserError, choose
from gradexp.layers import ranks

SCALARS = ("label", "top", "logprob")  # one number per image
TARGETS = (*SCALARS, "all")
INPUT = ".input"  # the images among modules, whose names have no dot in front
NO_PATH = (
    "the model's output does not depend on the images by differentiable operations: look for no_grad, detach or quantised "
    "layers in its forward pass"
)


def scalar(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """The function whose gradient is taken, one value per image.

    target: `label` (logit of the correct class, §2.4.1), `top` (largest logit), `logprob` (log-probability of
    the correct class, Eq. 2.3). logits (B, K), labels (B,) -> (B,).
    """
    if target == "label":
        return logits.gather(1, labels[:, None])[:, 0]
    if target == "top":
        return logits.max(dim=1).values
    if target == "logprob":
        return logits.log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    raise UserError(f"target={target}: here it is one of {', '.join(SCALARS)}")


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
    a layer's output is the gradient with respect to the layer's bias, position by position. -> {name: (B, ...)}, without the
    values on which the output does not depend, such as those of another head.
    """
    with torch.enable_grad():
        output = scalar(logits, labels, target)
    slopes = _gradients(output, list(values.values()), differentiable, allow_unused=True)
    if any(name == INPUT and slope is None for name, slope in zip(values, slopes, strict=True)):
        raise UserError(NO_PATH)
    return {name: slope for name, slope in zip(values, slopes, strict=True) if slope is not None}


def gradient_of_values(values: Tensor, images: Tensor, *, differentiable: bool) -> Tensor:
    """Input-gradient of one value per image, computed from `images` with `images.requires_grad`. (B,) -> (B, C, H, W)."""
    return _gradients(values, [images], differentiable)[0]


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor | int, *, target: str = "label") -> Tensor:
    """Input-gradient of `model` in its present mode, as a constant.

    A model in train mode uses batch statistics and updates its running ones, as in any forward pass.

    images (B, C, H, W), labels (B,) or one class for all -> (B, C, H, W), or (B, K, C, H, W) for `target="all"`. target: of
    which output, `label` (logit of `labels`), `top` (largest logit), `logprob` (log-probability of `labels`) or `all` logits.
    Works under `no_grad` and `inference_mode`. Raises UserError for images that are no tensor of floating point, labels that
    are no classes of the model, and a model that does not return logits (B, K), or by no differentiable operations.
    """
    choose("target", target, *TARGETS)
    with differentiable_anyway():
        images = checked_images(images).requires_grad_()
        labels = checked_labels(labels, images)
        with fitting(model, images):
            logits = checked_logits(model(images.clone()))  # which the model may change in place
        if target in ("label", "logprob") and labels.device.type == "cpu":  # elsewhere, each call would wait for the device
            check_classes(labels, logits)
        return gradient_of(logits, images, labels, target=target, differentiable=False).detach()


@contextmanager
def differentiable_anyway() -> Iterator[None]:
    """Inside, autograd records, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def constant(images: Tensor) -> Tensor:
    """Images, or labels, without their history. Those made under `inference_mode` are copied, because autograd refuses them."""
    return images.clone() if images.is_inference() else images.detach()


def checked_images(images: Any) -> Tensor:
    """Images without their history. Raises UserError unless they are a tensor of floating point."""
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}; give a tensor (B, C, H, W)")
    if not images.is_floating_point():
        raise UserError(f"images are {images.dtype}, which has no gradients: give images.float(), scaled as the model expects")
    return constant(images)


@contextmanager
def fitting(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Inside, an error of torch about images of another dtype, device or number of channels than the model's is a UserError."""
    try:
        yield
    except RuntimeError as error:
        own = next((each for each in model.parameters() if each.is_floating_point()), images)
        if images.dtype != own.dtype and "type" in str(error):
            raise UserError(
                f"the images are {images.dtype}, the model's parameters {own.dtype}: give images.to({own.dtype})"
            ) from error
        if images.device != own.device:
            raise UserError(
                f"the images are on {images.device}, the model on {own.device}: give images.to({str(own.device)!r})"
            ) from error
        found = re.search(r"to have (\d+) channels, but got (\d+)", str(error))
        if found and images.ndim == 4 and int(found[2]) == images.shape[1]:
            raise UserError(f"the images have {found[2]} channels, the model takes {found[1]}; convert the images") from error
        raise


def checked_labels(labels: Any, images: Tensor) -> Tensor:
    """Classes (B,), given as one for all images or one for each. Raises UserError for anything else."""
    try:
        classes = constant(torch.as_tensor(labels, device=images.device))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"labels are a {type(labels).__name__}; give one class, or a tensor of one per image") from None
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise UserError(f"labels are {classes.dtype}; give classes, which are whole numbers")
    if classes.ndim and classes.shape != images.shape[:1]:
        raise UserError(f"labels have shape {tuple(classes.shape)}: give one class, or one per image, ({len(images)},)")
    return classes.long().expand(len(images))


def check_classes(labels: Tensor, logits: Tensor) -> None:
    """Raises UserError for a label that is no class of the logits (B, K)."""
    if len(wrong := labels[(labels < 0) | (labels >= logits.shape[1])]):
        raise UserError(f"there is no class {int(wrong[0])}: the model has classes 0 to {logits.shape[1] - 1}")


def checked_logits(output: Any) -> Tensor:
    """A model's output. Raises UserError unless it is a tensor (B, K)."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    kind = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise UserError(f"the model returns {kind}, where logits (B, K) are expected: wrap it so that it returns these alone")


def loss_gradient(model: nn.Module, images: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Input-gradient of the cross-entropy of softmax(logits / temperature) (Eq. 5.6), as a constant.

    images (B, C, H, W), labels (B,) -> (B, C, H, W). It is Σ_j p_j (∇f_j - ∇f_y) / temperature, and computed as that. With
    the p_y - 1 of the ordinary form, which rounds where p_y is near 1, a function added to all logits would show in the
    gradients of confident images.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        logits = model(images)
        others = (logits.detach() / temperature).softmax(1).scatter(1, labels[:, None], 0)
        loss = (others * (logits - logits.gather(1, labels[:, None]))).sum(1) / temperature
        return _gradients(loss, [images], False)[0].detach()


def taylor_trace(model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor, *, sigma: float, target: str) -> Tensor:
    """One-sample Taylor estimate of the trace of the Hessian (Eq. 5.9): 2/sigma^2 (f(x + v) - f(x)), v ~ N(0, sigma^2).

    images (B, C, H, W), logits = model(images), labels (B,); the noisy images are a second pass in the model's present mode.
    In train mode they have batch statistics of their own, so that the estimate is not that of the network in eval mode,
    and they enter its running statistics. -> (B,).
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
    for name, module in model.named_modules():
        is_ours = isinstance(module, ranks.BatchNorm) or (isinstance(module, layers.BatchNorm) and module.is_fast)
        if isinstance(module, _NormBase) and not is_ours:
            fast = "accelerate(model), which is gradients.backend=fast" if type(module) is nn.BatchNorm2d else "another layer"
            raise UserError(
                f"the hutchinson estimator needs third derivatives, and {name} ({type(module).__name__}) has two: take {fast}, "
                f"or the taylor estimator"
            )


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between two gradients, image by image. (B, ...) and (B, ...) -> (B,)."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1), dim=1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _product(gradient: Tensor, images: Tensor, direction: Tensor, differentiable: bool) -> Tensor:
    """The Hessian times `direction` (Pearlmutter, 1994); zero for a linear network."""
    if not gradient.requires_grad:
        raise UserError("the input-gradient has no graph: compute it with differentiable=True")
    product = _gradients(gradient * direction, [images], differentiable, allow_unused=True)[0]
    return torch.zeros_like(images) if product is None else product


def _gradients(
    values: Tensor, inputs: Sequence[Tensor], differentiable: bool, *, allow_unused: bool = False
) -> tuple[Any, ...]:
    # The sum keeps one backward pass for the whole batch. In train mode, batch statistics couple the images:
    # this is then the gradient of the batch's sum, as in the author's code.
    if not values.requires_grad:
        raise UserError(NO_PATH)
    with torch.enable_grad(), layers.only_inputs():
        slopes = torch.autograd.grad(values.sum(), inputs, create_graph=differentiable, retain_graph=True, allow_unused=True)
    if not allow_unused and any(slope is None for slope in slopes):
        raise UserError(NO_PATH)
    return slopes
