"""Pixel perturbation (§3.5.1): what removing the least (or most) salient pixels does to the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.data.loader import Batch
from gradexp.evaluate import masking
from gradexp.gradients import evaluating
from gradexp.saliency import Saliency

MASKS = {"least": masking.least_salient, "most": masking.most_salient}
CHANGE = "output_change"


class Reading(NamedTuple):
    """One way to remove pixels: which go first, and what takes their place."""

    order: str
    fill: str | float


class PixelPerturbation:
    """|f(perturbed) - f(x)| / |f(x)| of the most confident class, for each fraction of removed pixels (fig. 3.2a).

    fractions: of all pixels, rounded to whole pixels. order: `least` or `most` salient first. fill: `black`, `image_mean`,
    `imputed` (masking.impute), or a number: 0 is the data's mean colour where images are normalised.
    area: also one number a curve, its mean height over log fractions (`log`) or fractions (`linear`); None for none.
    readings: {name: {order, fill}} of other ways to remove pixels by the same maps; what is left out is as above.
    """

    def __init__(
        self,
        *,
        fractions: Sequence[float],
        order: str,
        fill: str | float,
        area: str | None = None,
        readings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if area is not None and choose("evaluate.area", area, "log", "linear") == "log" and min(fractions) <= 0:
            raise UserError("evaluate.area=log: it needs fractions above 0; take evaluate.area=linear, or leave 0 out")
        self.fractions, self.area = list(fractions), area
        self.readings = {"": Reading(order, fill)}
        for name, changed in (readings or {}).items():
            if wrong := [key for key in changed if key not in Reading._fields]:
                raise UserError(
                    f"evaluate.readings.{name}.{wrong[0]}: there is no such key; it has {', '.join(Reading._fields)}"
                )
            self.readings[f"{name}/"] = Reading(**{"order": order, "fill": fill, **changed})
        for reading in self.readings.values():
            choose("evaluate.order", reading.order, *MASKS)

    def __call__(self, model: nn.Module, method: Saliency, batch: Batch, *, black: Tensor, seed: int) -> dict[str, Tensor]:
        """black: (C, 1, 1), seed: of ties -> {`output_change@removed=...`: (B,)}, and `output_change_area` where asked for.

        Those of a further reading have its name and a slash in front.
        """
        ranks = masking.ranks(method(model, batch.images)[:, 0], seed=seed)
        found: dict[str, Tensor] = {}
        with torch.no_grad(), evaluating(model):
            before, top = model(batch.images).max(1)
            for name, reading in self.readings.items():
                fill = black if reading.fill == "black" else reading.fill
                curve = []
                for fraction in self.fractions:
                    removed = masking.remove(batch.images, MASKS[reading.order](ranks, fraction), fill)
                    after = model(removed).gather(1, top[:, None])[:, 0]
                    curve.append((after - before).abs() / before.abs())
                    found[f"{name}{CHANGE}@removed={fraction:g}"] = curve[-1]
                if self.area is not None:
                    found[f"{name}{CHANGE}_area"] = mean_height(self.fractions, torch.stack(curve, 1), log=self.area == "log")
        return found


def mean_height(fractions: Sequence[float], curves: Tensor, *, log: bool) -> Tensor:
    """The area below curves (trapezoids), divided by its width; log: over the logarithm of the fractions.

    curves (B, F) -> (B,). Of a single fraction, the curve's one value.
    """
    x = torch.tensor(fractions, dtype=torch.float64)
    x = x.log() if log else x
    if len(x) == 1:
        return curves[:, 0]
    return torch.trapezoid(curves.double(), x.to(curves.device), dim=1) / (x[-1] - x[0]).item()
