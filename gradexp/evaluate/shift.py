"""Input-gradients are not unique (§5.2), and loss-gradients hardly more so (§5.7.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients


class Shifted(nn.Module):
    """A model with one function added to all of its logits, g(x) = amplitude <picture, x>: its gradient is any picture.

    picture (C, H, W).
    """

    def __init__(self, model: nn.Module, picture: Tensor, *, amplitude: float) -> None:
        super().__init__()
        self.model, self.picture, self.amplitude = model, picture, amplitude

    def forward(self, images: Tensor) -> Tensor:
        shift = self.amplitude * (images * self.picture).flatten(1).sum(1, keepdim=True)
        return self.model(images) + shift


def shift_effects(model: nn.Module, shifted: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What a common shift of the logits changes: losses and loss-gradients not at all, logit-gradients at will.

    Largest changes over images, relative to the largest entry before; the angle (degrees) is a mean.
    """
    with torch.no_grad():
        losses = [functional.cross_entropy(one(images), labels, reduction="none") for one in (model, shifted)]
    of_loss = [gradients.loss_gradient(one, images, labels, temperature=1.0) for one in (model, shifted)]
    of_logit = [gradients.input_gradient(one, images, labels) for one in (model, shifted)]
    return {
        "shift/loss_change": _change(*losses),
        "shift/loss_gradient_change": _change(*of_loss),
        "shift/logit_gradient_change": _change(*of_logit),
        "shift/logit_gradient_angle": float(gradients.angle(*of_logit).mean()),
    }


def sine_effects(model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, frequency: float) -> tuple[float, float]:
    """What adding g(x) = epsilon sin(frequency Σ x) to the loss changes: (largest change of the loss, mean L1 norm of that
    of the loss-gradient). By §5.7.1 at most epsilon, and epsilon · frequency · D.
    """
    points = images.detach().requires_grad_()
    loss = functional.cross_entropy(model(points), labels, reduction="none")
    moved = loss + epsilon * torch.sin(frequency * points.flatten(1).sum(1))
    before, after = (torch.autograd.grad(values.sum(), points, retain_graph=True)[0] for values in (loss, moved))
    return float((moved - loss).detach().abs().max()), float((after - before).abs().flatten(1).sum(1).mean())


def _change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())
