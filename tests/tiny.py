"""Tiny networks and batches in float64, on which identities are exact."""

import torch
from torch import Tensor, nn

from gradexp.data.loader import Batch

CLASSES = 3


def randomised(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, with random statistics, scales and biases in every batch normalisation."""
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.eval()


def batch(count: int, size: int) -> Batch:
    """Always the same images, of two channels, and labels."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 2, size, size, dtype=torch.float64, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Batch(images, labels, torch.arange(count), torch.zeros(count, dtype=torch.long))


class Quadratic(nn.Module):
    """Logit k is x' A_k x / 2 + b_k' x, whose Hessian is A_k."""

    def __init__(self, size: int) -> None:
        super().__init__()
        matrix = torch.randn(CLASSES, size, size, dtype=torch.float64)
        self.matrix = (matrix + matrix.mT) / 2
        self.slope = torch.randn(CLASSES, size, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return torch.einsum("bi,kij,bj->bk", x, self.matrix, x) / 2 + x @ self.slope.T
