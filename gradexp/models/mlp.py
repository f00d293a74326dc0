"""A small multi-layer perceptron, for illustrations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """images (B, ...) -> logits (B, classes), with softplus activations (β = 5). inputs: entries of an image."""

    def __init__(self, *, name: str, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        self.name = name
        layers: list[nn.Module] = []
        for before, after in pairwise([inputs, *hidden]):
            layers += [nn.Linear(before, after), nn.Softplus(beta=5)]
        self.hidden = nn.Sequential(*layers)
        self.linear = nn.Linear([inputs, *hidden][-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.hidden(images.flatten(1)))
