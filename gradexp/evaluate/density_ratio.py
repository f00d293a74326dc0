"""Ratios of the implicit density under input noise (§5.5.1, Figure 5.1)."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from gradexp.base.ranges import NonNegative, require
from gradexp.data.loader import Batch


@torch.inference_mode()
def density_ratio(model: nn.Module, batches: Iterable[Batch], *, sigmas: Sequence[float], seed: int) -> dict[str, list[float]]:
    """Mean over images of p(x + η | y) / p(x | y) = exp(f_y(x + η) - f_y(x)), η ~ N(0, sigma² I), for each sigma.

    `density_ratio/log`: mean of the logarithm; `density_ratio/std` and `density_ratio/log_std`: standard deviations over images
    of the ratio and of its logarithm (N - 1).
    One direction is drawn per image and scaled by each sigma; `seed` gives the same ones for every model, which must be in
    eval mode. Raises UserError for a negative sigma.
    """
    require(Sequence[NonNegative], sigmas=sigmas)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for images, labels, *_ in batches:
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        logits = [model(images + sigma * noise).gather(1, labels[:, None])[:, 0] for sigma in (0.0, *sigmas)]
        parts.append((torch.stack(logits[1:]) - logits[0]).double())
    logs = torch.cat(parts, dim=1)  # (sigmas, N)
    return {
        "sigma": list(sigmas),
        "density_ratio": logs.exp().mean(1).tolist(),
        "density_ratio/std": logs.exp().std(1).tolist(),
        "density_ratio/log": logs.mean(1).tolist(),
        "density_ratio/log_std": logs.std(1).tolist(),
    }
