"""Pixel perturbation (§3.5.1): change of the output when the least, or most, salient pixels are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Fractions
from gradexp.data.loader import Batch
from gradexp.evaluate import masking
from gradexp.gradients import evaluating
from gradexp.saliency import Saliency

CHANGE = "output_change"
FRACTIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)  # Figure 3.2a


def perturb_pixels(
    model: nn.Module,
    images: Tensor,
    method: Saliency,
    *,
    fractions: Sequence[float] = FRACTIONS,
    order: str = "least",
    fill: str | float | Tensor = "image_mean",
    seed: int = 0,
) -> Tensor:
    """Change of the output when pixels are removed, |f(perturbed) - f(x)| / |f(x)| of the predicted class (§3.5.1).

    images (B, C, H, W) -> (B, F) for F removed fractions. order: `least` or `most` salient pixels. fill: see masking.remove.
    seed: orders equal saliencies. The model is in eval mode meanwhile. Raises UserError for unknown words and fractions outside
    [0, 1].
    """
    choose("order", order, *masking.ORDERS)
    masking.check_fill("fill", fill)
    ranks = masking.salient_ranks(model, images, method, seed=seed)
    with torch.no_grad(), evaluating(model):
        before, top = model(images).max(1)
        return output_changes(model, images, ranks, before, top, fractions=fractions, order=order, fill=fill)


def output_changes(
    model: nn.Module,
    images: Tensor,
    ranks: Tensor,
    before: Tensor,
    top: Tensor,
    *,
    fractions: Sequence[float],
    order: str,
    fill: str | float | Tensor,
) -> Tensor:
    """As `perturb_pixels`, by given ranks (B, H, W). before: the outputs f(x) of the classes `top`, (B,) each."""
    curve = []
    for fraction in fractions:
        perturbed = masking.remove(images, masking.ORDERS[order](ranks, fraction), fill)
        after = model(perturbed).gather(1, top[:, None])[:, 0]
        curve.append((after - before).abs() / before.abs())
    return torch.stack(curve, 1)


class Reading(NamedTuple):
    """One way to remove pixels: `least` or `most` salient first, and the replacement."""

    order: str
    fill: str | float


class PixelPerturbation:
    """|f(perturbed) - f(x)| / |f(x)| of the most confident class, for each removed fraction (Figure 3.2a, Table 3.2).

    fractions: of all pixels, rounded to whole pixels. order: `least` or `most` salient first. fill: `black`, `image_mean`,
    `imputed` (masking.impute) or a number; 0 is the mean colour of normalised data.
    area: also the mean height of the curve over log fractions (`log`) or over fractions (`linear`); None for no area.
    readings: {name: {order, fill}}, further ways to remove pixels by the same maps; a missing key is as above.
    Raises UserError for an unknown word and for area=log with a fraction of 0.
    """

    def __init__(
        self,
        *,
        fractions: Fractions,
        order: str,
        fill: str | float,
        area: str | None = None,
        readings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if area is not None and choose("evaluate.area", area, "log", "linear") == "log" and min(fractions) <= 0:
            raise UserError("evaluate.area=log needs fractions above 0: take evaluate.area=linear, or leave 0 out")
        self.fractions, self.area = list(fractions), area
        self.readings = {"": Reading(order, fill)}
        for name, changed in (readings or {}).items():
            for key in changed:
                if key not in Reading._fields:
                    raise UserError(f"evaluate.readings.{name}.{key}: unknown key; take {' or '.join(Reading._fields)}")
            self.readings[f"{name}/"] = Reading(**{"order": order, "fill": fill, **changed})
        for reading in self.readings.values():
            choose("evaluate.order", reading.order, *masking.ORDERS)
            masking.check_fill("evaluate.fill", reading.fill, "black")

    def __call__(self, model: nn.Module, method: Saliency, batch: Batch, *, black: Tensor, seed: int) -> dict[str, Tensor]:
        """{`output_change@removed=FRACTION`: (B,)}, and `output_change_area` with an area; computed in eval mode.

        The keys of a further reading begin with its name and a slash. black (C, 1, 1): the value of black pixels in the units
        of the images. seed: orders equal saliencies.
        """
        ranks = masking.salient_ranks(model, batch.images, method, seed=seed)
        changes: dict[str, Tensor] = {}
        with torch.no_grad(), evaluating(model):
            before, top = model(batch.images).max(1)
            for name, reading in self.readings.items():
                fill = black if reading.fill == "black" else reading.fill
                curves = output_changes(
                    model, batch.images, ranks, before, top, fractions=self.fractions, order=reading.order, fill=fill
                )
                for fraction, values in zip(self.fractions, curves.unbind(1), strict=True):
                    changes[f"{name}{CHANGE}@removed={fraction:g}"] = values
                if self.area is not None:
                    changes[f"{name}{CHANGE}_area"] = mean_height(self.fractions, curves, log=self.area == "log")
        return changes


def mean_height(fractions: Sequence[float], curves: Tensor, *, log: bool) -> Tensor:
    """Area below curves (trapezoidal rule) divided by its width: (B, F) -> (B,). For a single fraction, the curve's value.

    log: over the logarithms of the fractions.
    """
    x = torch.tensor(fractions, dtype=torch.float64)
    x = x.log() if log else x
    if len(x) == 1:
        return curves[:, 0]
    return torch.trapezoid(curves.double(), x.to(curves.device), dim=1) / (x[-1] - x[0]).item()
