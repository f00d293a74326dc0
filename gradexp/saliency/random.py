"""Random maps, the lower bound of any comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradexp.saliency.method import Saliency


@dataclass(frozen=True, kw_only=True)
class Random(Saliency):
    """Uniform in [0, 1), pixel by pixel."""

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        return torch.rand_like(images[:, :1])
