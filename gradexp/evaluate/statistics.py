"""The statistics of batch normalisation, estimated again for a trained network."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.gradients import evaluating


@torch.no_grad()
def reestimate(model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Sets the running statistics of `model` to those of all the images together, exactly.

    In eval mode it then computes what it would in train mode with all of them as one batch (variances are those of the images,
    without Bessel's correction). A layer's input depends on the statistics of the layers before it, so each has a pass over the
    images of its own. batches: gives the same images (B, C, H, W), in batches of any size, each time it is called.
    Raises UserError for a normalisation that is called twice in a forward pass.
    """
    with evaluating(model):
        for norm in _in_order(model, next(iter(batches()))[:1]):
            mean, variance = _moments(_inputs(model, norm, batches()))
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def _in_order(model: nn.Module, image: Tensor) -> list[Any]:
    """The normalisations as a forward pass meets them."""
    met: list[nn.Module] = []
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(lambda module, _: met.append(module)) for norm in norms]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    if len(set(met)) < len(met):
        raise UserError(f"{type(model).__name__} calls a batch normalisation twice: it has no one input to estimate from")
    return met


def _inputs(model: nn.Module, norm: nn.Module, batches: Iterable[Tensor]) -> Iterable[Tensor]:
    """What `norm` is given for each batch, (B, c, h, w)."""
    given: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, values: given.append(values[0]))
    try:
        for images in batches:
            model(images)
            yield given.pop()
    finally:
        handle.remove()


def _moments(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all parts (B, c, h, w), accumulated in float64 (Chan et al., 1979). (c,), (c,)."""
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.transpose(0, 1).flatten(1).double()
        more, here = values.shape[1], values.mean(1)
        gap = here - mean.to(here)
        squares = squares.to(here) + (values - here[:, None]).square().sum(1) + gap.square() * (count * more / (count + more))
        mean = mean.to(here) + gap * (more / (count + more))
        count += more
    return mean, squares / count
