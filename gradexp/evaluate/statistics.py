"""Running statistics of batch normalisation, estimated again for a trained network."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.gradients import evaluating


@torch.no_grad()
def reestimate(model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Sets the running statistics of `model` to those of all images together.

    In eval mode the model then computes what it would in train mode with all images as one batch: variances are without
    Bessel's correction. The input of a normalisation depends on the statistics before it, so each takes its own pass over the
    images. batches: returns the same images (B, C, H, W), in batches of any size, at every call.
    Raises UserError for a normalisation that is called twice in a forward pass.
    """
    with evaluating(model):
        for norm in _in_order(model, next(iter(batches()))[:1]):
            mean, variance = _moments(_inputs(model, norm, batches()))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def _in_order(model: nn.Module, image: Tensor) -> list[Any]:
    """The batch normalisations in the order of the forward pass."""
    called: list[nn.Module] = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(lambda module, _: called.append(module)) for norm in norms]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    if len(set(called)) < len(called):
        raise UserError(f"{type(model).__name__} calls a batch normalisation twice: set statistics=null for such a model")
    return called


def _inputs(model: nn.Module, norm: nn.Module, batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """The input of `norm` for each batch: (B, c, h, w)."""
    inputs: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
    try:
        for images in batches:
            model(images)
            yield inputs.pop()
    finally:
        handle.remove()


def _moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all parts (B, c, h, w), accumulated in float64 (Chan et al., 1979): (c,), (c,)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.transpose(0, 1).flatten(1).double()
        added, part_mean = values.shape[1], values.mean(1)
        within = (values - part_mean[:, None]).square().sum(1)
        gap = part_mean - mean.to(part_mean)
        squares = squares.to(part_mean) + within + gap.square() * (count * added / (count + added))
        mean = mean.to(part_mean) + gap * (added / (count + added))
        count += added
    return mean, squares / count
