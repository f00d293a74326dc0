"""Gradients of a classifier with respect to its input: fast where they can be, differentiable where they must be."""

from __future__ import annotations

import torch
from torch import Tensor

from gradexp import layers
from gradexp.errors import UserError

TARGETS = ("label", "top", "logprob", "all")


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
        return torch.stack([_gradient(logits[:, k], images, differentiable) for k in range(logits.shape[1])], dim=1)
    return _gradient(scalar(logits, labels, target), images, differentiable)


def input_gradient(model: torch.nn.Module, images: Tensor, labels: Tensor, *, target: str = "label") -> Tensor:
    """Input-gradient of `model` in its present mode, as a constant.

    images (B, C, H, W), labels (B,) -> (B, C, H, W), or (B, K, C, H, W) for `target="all"`.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        return gradient_of(model(images), images, labels, target=target, differentiable=False).detach()


def taylor_trace(
    model: torch.nn.Module, images: Tensor, logits: Tensor, labels: Tensor, *, sigma: float, target: str
) -> Tensor:
    """One-sample Taylor estimate of the trace of the Hessian (Eq. 5.9): 2/sigma^2 (f(x + v) - f(x)), v ~ N(0, sigma^2).

    logits = model(images); the noisy images are a second pass in the model's present mode. -> (B,).
    """
    noisy = model(images + sigma * torch.randn_like(images))
    return 2 / sigma**2 * (scalar(noisy, labels, target) - scalar(logits, labels, target))


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle in degrees between two gradients, image by image. (B, ...) and (B, ...) -> (B,)."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(1), second.flatten(1), dim=1)
    return torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))


def _gradient(values: Tensor, images: Tensor, differentiable: bool) -> Tensor:
    # The sum keeps one backward pass for the whole batch. In train mode, batch statistics couple the images:
    # this is then the gradient of the batch's sum, as in the author's code.
    with layers.only_inputs():
        (gradient,) = torch.autograd.grad(values.sum(), images, create_graph=differentiable, retain_graph=True)
    return gradient
