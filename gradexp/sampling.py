"""Samples from the density implicit in a classifier: exp f_y(x) is p(x | y) up to a constant factor (§5.3, §5.4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Gaussian, NonNegative, Positive, require_fields


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """Gradient ascent on the label's logit, image by image, on pixels in [0, 1] (§1.5.1, §5.4.1, §5.5.1):

        x <- clip(x + rate (∇f_y(x) - pull (x - ½)) + langevin √(2 rate) z, 0, 1),  z ~ N(0, I).

    With langevin = 0 it climbs to a mode. §1.5.1 prints -rate ∇p, but Langevin dynamics ascends ∇log p, which is ∇f_y.
    start: mean and standard deviation of the Gaussian from which samples start. noise: standard deviation of the noise that
    `denoise` adds to images. Raises UserError for a setting out of its range.
    """

    steps: Count
    rate: Positive
    pull: float
    langevin: NonNegative
    start: Gaussian | None
    noise: NonNegative | None

    def __post_init__(self) -> None:
        require_fields(self)

    def sample(self, model: nn.Module, labels: Tensor, seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Samples of the classes `labels` (B,), each of `shape` (C, H, W) and with its own seed: (B, C, H, W)."""
        if self.start is None:
            raise UserError("start is null: set a mean and a standard deviation, as in conf/sampling/ascent.yaml")
        mean, std = self.start
        draws = Draws(seeds, shape, labels.device)
        return self.climb(model, (mean + std * draws.normal()).clamp(0, 1), labels, draws)

    def denoise(self, model: nn.Module, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images with added noise, and where the ascent takes them (§5.10): (B, C, H, W) each."""
        if self.noise is None:
            raise UserError("noise is null: set a standard deviation, as in conf/sampling/denoise.yaml")
        draws = Draws(seeds, images.shape[1:], images.device)
        noisy = (images + self.noise * draws.normal()).clamp(0, 1)
        return noisy, self.climb(model, noisy, labels, draws)

    def climb(self, model: nn.Module, images: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        """All steps of the ascent. Raises UserError for a model in train mode, whose batch statistics couple the images."""
        if any(module.training for module in model.modules()):
            raise UserError("sampling needs the model in eval mode: call model.eval()")
        for _ in range(self.steps):
            step = gradients.input_gradient(model, images, labels) - self.pull * (images - 0.5)
            images = images + self.rate * step
            if self.langevin:
                images = images + self.langevin * (2 * self.rate) ** 0.5 * draws.normal()
            images = images.clamp(0, 1)
        return images


class Draws:
    """Standard Gaussian noise with one generator per image, so that a sample depends on its seed and not on its batch."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def normal(self) -> Tensor:
        """The next draw of every image: (B, *shape)."""
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators]).to(self.device)
