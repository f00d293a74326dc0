"""What the author's last released code computes (github.com/idiap/fullgrad-saliency), to be compared with the equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, NonNegative
from gradexp.saliency.method import Saliency, predicted, upsample

EPSILON = 1e-6
BIASED = (nn.Conv2d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True)
class ReferenceFullGrad(Saliency):
    """ψ(∇f ⊙ x) + Σ ψ(bias-gradient), a map for each convolution and each batch normalisation that has a bias parameter.

    The bias of a normalisation is β - γ mean / sqrt(var + ε). ψ: absolute value, minus the smallest value of the image's
    layer, divided by the largest one left plus 1e-6, upsampled with align_corners=True. Biases of linear layers and of
    curved activations have no map.
    """

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return torch.stack([self.processed(maps, images) for maps in self.terms(model, images, labels)]).sum(0)

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        """∇f ⊙ x, and the maps of the layers in order; (B, c, h, w) each."""
        at_input, slopes, biases = self._slopes(model, images, labels)
        return [at_input * images, *(slopes[name] * bias.view(-1, 1, 1) for name, bias in biases.items())]

    def processed(self, maps: Tensor, images: Tensor) -> Tensor:
        """Σ_c ψ(maps_c). (B, c, h, w) -> (B, 1, H, W)."""
        values = maps.abs()
        values = values - values.amin((1, 2, 3), keepdim=True)
        values = values / (values.amax((1, 2, 3), keepdim=True) + EPSILON)
        return upsample(values.sum(1, keepdim=True), images.shape[-2:], align_corners=True)

    def _slopes(
        self, model: nn.Module, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The input-gradient, {layer: gradient at its output} and {layer: its bias} of the layers that have one."""
        modules = {
            name: module for name, module in model.named_modules() if isinstance(module, BIASED) and module.bias is not None
        }
        images = images.detach().requires_grad_()
        with gradients.captured(model, list(modules)) as outputs:
            logits = model(images)
        classes = logits.argmax(1) if labels is None else labels
        called = {name: outputs[name] for name in modules if name in outputs}
        values = {gradients.INPUT: images, **called}
        slopes = gradients.gradients_of(logits, values, classes, target="label", differentiable=False)
        biases = {name: gradients.effective_bias(modules[name]) for name in called if name in slopes}
        return slopes.pop(gradients.INPUT), slopes, {name: bias.detach() for name, bias in biases.items() if bias is not None}


@dataclass(frozen=True, kw_only=True)
class ReferenceSimpleFullGrad(ReferenceFullGrad):
    """The gradients at the outputs of the same layers in place of their bias-gradients."""

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        at_input, slopes, _ = self._slopes(model, images, labels)
        return [at_input * images, *slopes.values()]


@dataclass(frozen=True, kw_only=True)
class ReferenceSmoothFullGrad(ReferenceFullGrad):
    """ψ of the sums of full-gradients over noisy copies.

    The noise's standard deviation is `sigma` times the range of values of the whole batch. The input's term is summed over
    channels with its signs before ψ. Without a target, each copy is explained for the class that it is predicted to be.
    """

    samples: Count = 25
    sigma: NonNegative = 0.15

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> list[Tensor]:
        noise = self.sigma * (images.max() - images.min())
        sums: list[Tensor] = []
        for _ in range(self.samples):
            at_input, *rest = super().terms(model, images + noise * torch.randn_like(images), labels)
            terms = [at_input.sum(1, keepdim=True), *rest]
            sums = [total + term for total, term in zip(sums, terms, strict=True)] if sums else terms
        return sums


@dataclass(frozen=True, kw_only=True)
class ReferenceGradCAM(Saliency):
    """The positive part of the last convolution's own output, weighted by the mean gradients there; positive part, upsampled.

    The convolution's output is before any normalisation. Upsampled with align_corners=True.
    """

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        classes, images = predicted(model, images, labels), images.detach().requires_grad_()
        with gradients.captured(model, names) as outputs:
            logits = model(images)
        slopes = gradients.gradients_of(logits, outputs, classes, target="label", differentiable=False) if outputs else {}
        if not slopes:
            raise UserError("the output does not depend on a convolution by differentiable operations; take another method")
        name = [name for name in names if name in slopes][-1]
        slope = slopes[name]
        maps = (slope.mean((2, 3), keepdim=True) * outputs[name].relu()).sum(1, keepdim=True).relu()
        return upsample(maps, images.shape[-2:], align_corners=True)
