"""Energy of pictures at high spatial frequencies, a measure of their noise."""

import torch
from torch import Tensor


def high_frequency(pictures: Tensor) -> Tensor:
    """Percentage of a picture's energy at spatial frequencies above 0.25 cycles per pixel, half the highest along an axis.

    The mean of each channel is left out. White noise of any size has about 80; a constant picture has NaN.
    pictures (B, C, H, W) -> (B,).
    """
    height, width = pictures.shape[-2:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]).to(pictures.device)
    energy = torch.fft.fft2(pictures).abs().square().sum(1) * (radius > 0)
    return 100 * (energy * (radius > 0.25)).sum((1, 2)) / energy.sum((1, 2))
