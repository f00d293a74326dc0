"""Changes of a network that leave its classification alone but not its input-gradients (§5.2, §5.7.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients


class Shifted(nn.Module):
    """A model with g(x) = amplitude <picture, x> added to all logits; ∇g is the picture, scaled (§5.2). picture (C, H, W)."""

    def __init__(self, model: nn.Module, picture: Tensor, *, amplitude: float) -> None:
        super().__init__()
        self.model, self.picture, self.amplitude = model, picture, amplitude

    def forward(self, images: Tensor) -> Tensor:
        shift = self.amplitude * (images * self.picture).flatten(1).sum(1, keepdim=True)
        return self.model(images) + shift


def shift_effects(model: nn.Module, shifted: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Changes of losses, loss-gradients and logit-gradients from `model` to `shifted`, each in its present mode.

    Largest absolute change over images and pixels, relative to the largest absolute value before; by §5.2 zero for all but
    logit-gradients. `shift/logit_gradient_angle`: mean over images, in degrees.
    """
    models = (model, shifted)
    with torch.no_grad():
        losses = [functional.cross_entropy(network(images), labels, reduction="none") for network in models]
    loss_gradients = [gradients.loss_gradient(network, images, labels, temperature=1.0) for network in models]
    logit_gradients = [gradients.input_gradient(network, images, labels) for network in models]
    return {
        "shift/loss_change": _change(*losses),
        "shift/loss_gradient_change": _change(*loss_gradients),
        "shift/logit_gradient_change": _change(*logit_gradients),
        "shift/logit_gradient_angle": float(gradients.angle(*logit_gradients).mean()),
    }


def sine_effects(model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, frequency: float) -> tuple[float, float]:
    """Effects of adding g(x) = epsilon sin(frequency Σ x) to the loss (§5.7.1).

    Returns the largest change of the loss over images, at most epsilon, and the L1 norm of the change of the loss-gradient,
    a mean over images, at most epsilon · frequency · D.
    """
    points = images.detach().requires_grad_()
    loss = functional.cross_entropy(model(points), labels, reduction="none")
    moved = loss + epsilon * torch.sin(frequency * points.flatten(1).sum(1))
    before, after = (torch.autograd.grad(values.sum(), points, retain_graph=True)[0] for values in (loss, moved))
    return float((moved - loss).detach().abs().max()), float((after - before).abs().flatten(1).sum(1).mean())


def _change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())
