"""Pixel perturbation (§3.5.1): what removing the least (or most) salient pixels does to the output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradexp.data.loader import Batch
from gradexp.errors import choose
from gradexp.evaluate import masking
from gradexp.gradients import evaluating
from gradexp.saliency import Saliency

MASKS = {"least": masking.least_salient, "most": masking.most_salient}


class PixelPerturbation:
    """|f(perturbed) - f(x)| / |f(x)| of the most confident class, for each fraction of removed pixels (fig. 3.2a).

    fractions: of all pixels. order: `least` or `most` salient first. fill: `black`, `image_mean`, or a number.
    """

    def __init__(self, *, fractions: Sequence[float], order: str, fill: str | float) -> None:
        self.fractions, self.mask, self.fill = list(fractions), MASKS[choose("evaluate.order", order, *MASKS)], fill

    def __call__(self, model: nn.Module, method: Saliency, batch: Batch, *, black: Tensor, seed: int) -> dict[str, Tensor]:
        """black: (C, 1, 1), seed: of ties -> {`output_change@removed=...`: (B,)}."""
        images = batch.images
        ranks = masking.ranks(method(model, images)[:, 0], seed=seed)
        fill = black if self.fill == "black" else self.fill
        changes = {}
        with torch.no_grad(), evaluating(model):
            before, top = model(images).max(1)
            for fraction in self.fractions:
                logits = model(masking.remove(images, self.mask(ranks, fraction), fill))
                after = logits.gather(1, top[:, None])[:, 0]
                changes[f"output_change@removed={fraction:g}"] = (after - before).abs() / before.abs()
        return changes
