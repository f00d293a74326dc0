"""Digit flipping (§3.10.1): one digit becomes another when the evidence for the first is removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.base.ranges import Fraction, Index
from gradexp.data.loader import Batch
from gradexp.evaluate import masking
from gradexp.gradients import evaluating
from gradexp.saliency import Saliency


class DigitFlip:
    """Decrease of logit_source - logit_target when pixels for `source` and against `target` become black (Table 3.1).

    Pixels are ranked by S_source - S_target, the difference of the two logits' maps. The highest-ranked become black: at most
    `fraction` of all pixels, and only where the difference is positive. Images of other digits are left out.
    Raises UserError where source and target are the same class.
    """

    def __init__(self, *, source: Index, target: Index, fraction: Fraction) -> None:
        if source == target:
            raise UserError(f"evaluate.target={target}: it must be another class than evaluate.source")
        self.source, self.target, self.fraction = source, target, fraction

    def __call__(self, model: nn.Module, method: Saliency, batch: Batch, *, black: Tensor, seed: int) -> dict[str, Tensor]:
        """{`log_odds_change`: (number of images of `source`,)}, computed in eval mode; empty without such an image.

        black (C, 1, 1): the value of black pixels in the units of the images. seed: orders equal differences.
        """
        images = batch.images[batch.labels == self.source]
        if not len(images):
            return {}
        difference = method(model, images, self.source) - method(model, images, self.target)
        flipped = masking.remove(images, self.removed(difference, seed), black)
        with torch.no_grad(), evaluating(model):
            return {"log_odds_change": self._log_odds(model(images)) - self._log_odds(model(flipped))}

    def removed(self, difference: Tensor, seed: int) -> Tensor:
        """Mask of the pixels that become black: (B, 1, H, W) -> bool (B, 1, H, W)."""
        return masking.most_salient(masking.ranks(difference[:, 0], seed=seed), self.fraction) & (difference > 0)

    def _log_odds(self, logits: Tensor) -> Tensor:
        return logits[:, self.source] - logits[:, self.target]
