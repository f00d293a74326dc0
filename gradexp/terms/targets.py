"""A teacher's outputs and gradients, as constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch

POWERS = {"absolute": 1, "attention": 2}  # {kind of attention map: power of |z| in the sum over channels}


class Map(NamedTuple):
    """Names a map of one layer, summed over channels.

    kind: `attention`, the sum of squares (Eq. 2.7); `absolute`, of absolute values (§4.4.1); `gradient`, of the gradient of
    `target` at the layer (Eq. 4.3).
    """

    kind: str
    layer: str
    target: str | None = None


class Targets:
    """Logits, features and gradients of a teacher, as constants; the values of one Batch object need one forward pass.

    The teacher is frozen in place, and put into eval mode now and before each forward pass. with_gradient: keep the graph of
    the forward pass, for gradients. layers: names of the modules whose outputs, or the gradients at them, will be read.
    """

    kind = "live"  # in records: computed for every batch

    def __init__(self, teacher: nn.Module, *, with_gradient: bool, layers: Sequence[str] = ()) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.with_gradient, self.layers = with_gradient, layers
        self._batch: Batch | None = None
        self._gradients: dict[str, dict[str, Tensor]] = {}

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        return self._forward(batch).detach()

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W), or the full Jacobian (B, K, C, H, W) for `all`."""
        if target == "all":
            logits = self._forward_with_gradient(batch)
            return gradients.gradient_of(logits, self._images, batch.labels, target=target, differentiable=False)
        return self._gradients_at(batch, target)[gradients.INPUT]

    def features(self, batch: Batch, layer: str) -> Tensor:
        """The output of one of `layers`: (B, c, h, w)."""
        self._forward(batch)
        return _of_layer(self._features, layer).detach()

    def layer_gradient(self, batch: Batch, layer: str, target: str) -> Tensor:
        """The gradient of `target` at one of `layers`: (B, c, h, w)."""
        slopes = self._gradients_at(batch, target)
        _of_layer(self._features, layer)
        if layer not in slopes:
            raise UserError(f"the teacher's output does not depend on layer {layer}")
        return slopes[layer]

    def map(self, batch: Batch, wanted: Map) -> Tensor:
        """A map of one of `layers`: (B, h, w)."""
        if wanted.kind in POWERS:
            return gradients.attention_map(self.features(batch, wanted.layer), POWERS[wanted.kind])
        return gradients.channel_sum(self.layer_gradient(batch, wanted.layer, str(wanted.target)))

    def feature_gradient(self, batch: Batch, layer: str, pick: Callable[[Tensor], Tensor]) -> Tensor:
        """The input-gradient of `pick`, one value per image from the output of one of `layers`: (B, C, H, W)."""
        self._forward_with_gradient(batch)
        return gradients.gradient_of_values(pick(_of_layer(self._features, layer)), self._images, differentiable=False)

    def _forward(self, batch: Batch) -> Tensor:
        if self._batch is not batch:
            self.teacher.eval()  # a module that has it as a part may have put it into train mode
            with torch.set_grad_enabled(self.with_gradient), gradients.captured(self.teacher, self.layers) as features:
                self._batch = batch
                self._images = batch.images.detach().requires_grad_(self.with_gradient)
                self._logits = self.teacher(self._images)
            self._features, self._gradients = features, {}
        return self._logits

    def _forward_with_gradient(self, batch: Batch) -> Tensor:
        if not self.with_gradient:
            raise UserError(
                "these targets have no gradients: a term that reads a teacher's declares needs_teacher = True and its "
                "gradient_target, such as 'label'; in Python, make them with Targets(..., with_gradient=True)"
            )
        return self._forward(batch)

    def _gradients_at(self, batch: Batch, target: str) -> dict[str, Tensor]:
        logits = self._forward_with_gradient(batch)
        if target not in self._gradients:
            values = {gradients.INPUT: self._images, **self._features}
            self._gradients[target] = gradients.gradients_of(logits, values, batch.labels, target=target, differentiable=False)
        return self._gradients[target]


def _of_layer(values: dict[str, Tensor], layer: str) -> Tensor:
    if layer not in values:
        raise UserError(f"{layer} is none of the layers of these targets: make them with Targets(..., layers=['{layer}'])")
    return values[layer]
