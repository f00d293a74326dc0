"""FullGrad: full-gradients summed into one map (Eq. 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.ranges import Count, NonNegative
from gradexp.gradients import FullGradient
from gradexp.gradients.operations import IMAGES
from gradexp.saliency.method import Saliency, explaining, predicted, value_range
from gradexp.saliency.psi import check, psi

LARGE_SHARE = 0.9  # of an output, whose absence from the map is a warning


@dataclass(frozen=True, kw_only=True)
class FullGrad(Saliency):
    """S = ψ(∇ₓf ⊙ x) + Σ_layers Σ_channels ψ(f^b), over the operations whose outputs are maps (Eq. 3.2).

    For any network of torch functions (gradexp.gradients.full_gradient); a grid of tokens is a map. psi: the steps of ψ
    (gradexp/saliency/psi.py). separate: a map per module; otherwise a convolution and its batch normalisation share one. With
    [abs, rescale, upsample] and without `separate` it is the author's code of December 2019; what he released last is
    ReferenceFullGrad. Warns where more than 90 % of an output has no spatial location.
    """

    psi: Sequence[str] = ("abs", "rescale", "upsample")
    separate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.psi)

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return torch.stack(list(self.of_layers(model, images, labels).values())).sum(0)

    def layers(self, model: nn.Module, images: Tensor, target: Tensor | int | None = None) -> dict[str, Tensor]:
        """The terms of the sum over layers, `input` the first; {layer: (B, 1, H, W)} (fig. 3.1)."""
        with explaining(model, images, target) as (model, labels):
            return self.of_layers(model, images, labels)

    def of_layers(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        return {name: psi(maps, self.psi, images.shape[-2:]) for name, maps in self.terms(model, images, labels).items()}

    def completeness_error(self, model: nn.Module, images: Tensor, target: Tensor | int | None = None) -> Tensor:
        """|sum of all full-gradients - f(x)| / |f(x)|, which Proposition 6 says is 0. (B,)."""
        with explaining(model, images, target) as (model, labels):
            return self.full_gradient(model, images, labels).error()

    def share_without_place(self, model: nn.Module, images: Tensor, target: Tensor | int | None = None) -> Tensor:
        """The part of f(x) that the map can't show, relative to f(x): the bias-gradients without spatial location. (B,)."""
        with explaining(model, images, target) as (model, labels):
            full = self.full_gradient(model, images, labels)
        return full.relative(full.outside())

    def full_gradient(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> FullGradient:
        target = "top" if labels is None else "label"
        labels = images.new_zeros(len(images), dtype=torch.long) if labels is None else labels
        return gradients.full_gradient(model, images, labels, target=target, separate=self.separate)

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """What ψ is applied to. Biases of linear layers and class tokens have no spatial location, and are left out."""
        full = self.full_gradient(model, images, labels)
        return {IMAGES: full.input * full.images, **full.planes(self.of_biases(full))}

    def of_biases(self, full: FullGradient) -> dict[str, Tensor]:
        if (full.outside().abs() > LARGE_SHARE * full.output.abs()).any():
            warnings.warn(
                f"more than {LARGE_SHARE:.0%} of an output has no spatial location and is on no map of {type(self).__name__}: "
                f"share_without_place(model, images) measures it",
                stacklevel=2,
            )
        return full.biases


@dataclass(frozen=True, kw_only=True)
class SimpleFullGrad(FullGrad):
    """Gradients before each activation in place of bias-gradients: no bias is needed.

    That is, at the output of each convolution, or of the normalisation behind it. The author's release, whose idea it is,
    is ReferenceSimpleFullGrad.
    """

    def of_biases(self, full: FullGradient) -> dict[str, Tensor]:
        return {name: maps for name, maps in full.gradients.items() if name not in full.nonlinear}


@dataclass(frozen=True, kw_only=True)
class SmoothFullGrad(FullGrad):
    """ψ of full-gradients that are averaged over noisy copies.

    samples, sigma, units: as for SmoothGrad. The author's release, whose idea it is, is ReferenceSmoothFullGrad.
    """

    samples: Count = 25
    sigma: NonNegative = 0.15
    units: str = "normalised"

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        labels = predicted(model, images, labels)
        noise = self.sigma * value_range(images, self.units, self)
        sums: dict[str, Tensor] = {}
        for _ in range(self.samples):
            copies = images + noise * torch.randn_like(images)
            for name, maps in super().terms(model, copies, labels).items():
                maps = gradients.precise(maps)
                sums[name] = sums[name] + maps if name in sums else maps
        return {name: maps / self.samples for name, maps in sums.items()}
