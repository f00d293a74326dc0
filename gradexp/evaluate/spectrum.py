"""How noisy a picture is: its energy at high spatial frequencies."""

import torch
from torch import Tensor


def high_frequency(pictures: Tensor) -> Tensor:
    """Percentage of a picture's energy at spatial frequencies above half of the highest, 0.25 cycles a pixel in any direction.

    White noise has 80, whatever its size; the mean of each channel does not count. NaN for a picture without any other energy.
    pictures (B, C, H, W) -> (B,).
    """
    height, width = pictures.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(pictures.device)
    energy = torch.fft.fft2(pictures).abs().square().sum(1) * (radius > 0)
    return 100 * (energy * (radius > 0.25)).sum((1, 2)) / energy.sum((1, 2))
