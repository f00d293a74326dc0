"""Energy of a gradient inside a mask (§5.7.2)."""

from torch import Tensor


def energy_inside(gradient: Tensor, mask: Tensor) -> Tensor:
    """Percentage of a gradient's magnitude, summed over channels and pixels, where `mask` is 1; NaN for a gradient of zeros.

    gradient (B, C, H, W), mask (H, W) -> (B,).
    """
    size = gradient.abs().sum(1)
    return 100 * (size * mask).sum((1, 2)) / size.sum((1, 2))
