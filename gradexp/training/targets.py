"""What a frozen teacher gives a student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch


class LiveTargets:
    """A teacher in eval mode, run once for every batch; a batch's logits and gradients share that run.

    with_gradient: keep the graph of the forward pass, because input-gradients will be asked for.
    """

    def __init__(self, teacher: nn.Module, *, with_gradient: bool) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.with_gradient = with_gradient
        self._batch: Batch | None = None

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        return self._forward(batch).detach()

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W), or (B, K, C, H, W) for `all`."""
        logits = self._forward(batch)
        return gradients.gradient_of(logits, self._images, batch.labels, target=target, differentiable=False)

    def _forward(self, batch: Batch) -> Tensor:
        if self._batch is not batch:
            with torch.set_grad_enabled(self.with_gradient):
                self._batch = batch
                self._images = batch.images.detach().requires_grad_(self.with_gradient)
                self._logits = self.teacher(self._images)
        return self._logits
