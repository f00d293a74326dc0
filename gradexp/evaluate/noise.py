"""Test accuracy under input noise (§2.6.2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from gradexp.data.loader import Batch, mix
from gradexp.evaluate.accuracy import accuracy


def noise_accuracies(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    sigma: float,
    draws: int,
    seed: int,
    classes: int,
    device: torch.device,
) -> list[float]:
    """Test accuracy in percent, in eval mode, for each of `draws` draws of Gaussian noise added to the normalised images.

    sigma: standard deviation of the noise. Draw i is the same for every model, and for every sigma up to that factor.
    """
    return [accuracy(model, _noisy(batches, sigma, mix(seed, draw)), classes=classes, device=device) for draw in range(draws)]


def _noisy(batches: Iterable[Batch], sigma: float, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise on every device
    for batch in batches:
        noise = torch.randn(batch.images.shape, generator=generator).to(batch.images)
        yield batch._replace(images=batch.images + sigma * noise)
