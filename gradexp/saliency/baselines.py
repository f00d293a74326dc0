"""The methods that FullGrad is compared with (thesis §1.4, §3.5).

Captum does the work where there is any. It is imported where it is used, as it takes a second and draws with matplotlib.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError, nearest
from gradexp.base.ranges import Count, NonNegative
from gradexp.saliency.method import Saliency, over_channels, predicted, upsample, value_range

# Pixels computed at a time by methods that look at many versions of an image: 256 images of 32x32.
CHUNK = 256 * 32 * 32


@dataclass(frozen=True, kw_only=True)
class InputGradient(Saliency):
    """∇ₓf (Simonyan et al., 2013).

    channels: how they are combined, `abs` (sum of absolute values), `sum` (signed), `square` (sum of squares) or `std`.
    """

    channels: str = "abs"

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return over_channels(_input_gradient(model, images, labels), self.channels)


@dataclass(frozen=True, kw_only=True)
class GradientTimesInput(Saliency):
    """∇ₓf ⊙ x, the first term of Eq. 3.1. channels as for InputGradient."""

    channels: str = "abs"

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return over_channels(_input_gradient(model, images, labels) * images, self.channels)


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(Saliency):
    """The mean input-gradient on the straight path from `black` to the image, times the difference of the two (§1.4.2).

    With the default black = 0, the path of a normalised image begins at the mean colour.

    steps: of the Gauss-Legendre quadrature. channels as for InputGradient.
    """

    steps: Count = 50
    channels: str = "abs"

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        from captum import attr

        baseline = torch.as_tensor(self.black, device=images.device, dtype=images.dtype).expand(images.shape)
        attributions = attr.IntegratedGradients(model).attribute(
            images,
            baseline,
            target=predicted(model, images, labels),
            n_steps=self.steps,
            internal_batch_size=max(len(images), CHUNK // images[0, 0].numel()),
        )
        return over_channels(attributions, self.channels)


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(Saliency):
    """The mean of the input-gradients of noisy copies (Smilkov et al., 2017).

    samples: noisy copies. sigma: the noise's standard deviation as a part of each image's own range of values; units: the
    range of what, `normalised` or `raw` (see value_range). channels as for InputGradient. The class is the one predicted
    without noise.
    """

    samples: Count = 50
    sigma: NonNegative = 0.15
    channels: str = "abs"
    units: str = "normalised"
    mean_of = "smoothgrad"
    power = 1

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        from captum import attr

        # Captum's noise has one standard deviation for the whole batch: so the noise is added in units of each
        # image's range, and the model is given the images in their own units again.
        precise = gradients.precise(images)  # Captum draws noise in float32 at least
        span = value_range(precise, self.units, self)
        tunnel = attr.NoiseTunnel(attr.Saliency(lambda units, span: model((units * span).to(images.dtype))))
        values = tunnel.attribute(
            precise / span,
            nt_type=self.mean_of,
            nt_samples=self.samples,
            nt_samples_batch_size=max(1, CHUNK // images[:, 0].numel()),
            stdevs=float(self.sigma),
            target=predicted(model, images, labels),
            additional_forward_args=(span,),
            abs=False,
        )
        return over_channels(values / span**self.power, self.channels)


@dataclass(frozen=True, kw_only=True)
class SmoothGradSquared(SmoothGrad):
    """The mean of the squared input-gradients of noisy copies (Hooker et al., 2018)."""

    mean_of = "smoothgrad_sq"
    power = 2


@dataclass(frozen=True, kw_only=True)
class GradCAM(Saliency):
    """Feature maps weighted by their mean gradients, positive part, upsampled (Selvaraju et al., 2017).

    layer: the module whose output is used, a map or tokens of a grid; None for the last convolution's map behind its
    normalisation and activation, as far as these are modules, or, in a network with attention, the last normalised tokens that
    the output depends on.
    smallest: of the convolutions whose map has at least so many rows and columns (gradients.last_features).
    """

    layer: str | None = None
    smallest: Count = 2

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        classes, images = predicted(model, images, labels), images.detach().requires_grad_()
        names = self.layers(model, images)
        with gradients.captured(model, names) as outputs:
            logits = gradients.checked_logits(model(images))
        slopes = gradients.gradients_of(logits, outputs, classes, target="label", differentiable=False) if outputs else {}
        pairs = [(self.plane(outputs[name], images), self.plane(slopes[name], images)) for name in names if name in slopes]
        if not pairs:
            raise UserError(f"saliency.layer={names[0]}: the output does not depend on it; choose another layer")
        features, slope = next(((features, slope) for features, slope in pairs if slope.any()), pairs[-1])
        return upsample((slope.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu(), images.shape[-2:])

    def plane(self, values: Tensor, images: Tensor) -> Tensor:
        """A layer's values as (B, c, h, w)."""
        height, width = images.shape[-2:]
        plane = gradients.as_plane(values, {(height // stride, width // stride) for stride in range(1, min(height, width))})
        if plane is not None:
            return plane
        if values.ndim != 4:
            raise UserError(f"saliency.layer={self.layer}: its output is no map; choose a layer with rows and columns")
        return values  # of another size, (B, c, h, w)

    def layers(self, model: nn.Module, images: Tensor) -> list[str]:
        """The modules of which the first one is used whose map or tokens the output depends on."""
        modules = dict(model.named_modules())
        if self.layer is None:
            return gradients.last_tokens(model, images[:1]) or [gradients.last_features(model, images[:1], self.smallest)]
        if self.layer not in modules:
            raise UserError(
                f"saliency.layer={self.layer}: the model has no such module{nearest(self.layer, modules)} "
                f"It has {', '.join(filter(None, modules))}"
            )
        return [self.layer]


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        return gradients.input_gradient(model, images, images.new_zeros(len(images), dtype=torch.long), target="top")
    return gradients.input_gradient(model, images, labels, target="label")
