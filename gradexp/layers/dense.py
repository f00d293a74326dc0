"""3 x 3 convolutions of 2 x 2 maps, as the matrix products that they are.

With one pixel of padding, every output of such a map sees every input: pixel q sees pixel p through the tap p - q. So the
convolution is a fully connected layer, whose matrix M (O 4, 4 C) repeats the taps:

    y = M x,    x's gradient  Mᵀ g,    M's gradient  g xᵀ, of which a tap's is the sum over its places in M.

These are 16 products for each pair of channels, where the kernels of a CPU take 36: 20 of them with the padding's zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 2
MIN_CHANNELS, MIN_BATCH = 128, 64

# M's tap, of a kernel read row by row, for output q (down) and input p (across), both read row by row; and 1 where it stands.
TAPS = torch.tensor(
    [(py - qy + 1) * 3 + (px - qx + 1) for qy in range(SIDE) for qx in range(SIDE) for py in range(SIDE) for px in range(SIDE)]
)
PLACES = functional.one_hot(TAPS, 9)


def suits(x: Tensor, w: Tensor) -> bool:
    """Whether this is the fastest way to convolve x (B, C, H, W) with w (O, C, 3, 3), as `convolve` does: by measurement.

    With fewer channels or images, writing M costs more than it saves.
    """
    return x.shape[2:] == (SIDE, SIDE) and min(w.shape[:2]) >= MIN_CHANNELS and len(x) >= MIN_BATCH


def convolve(x: Tensor, w: Tensor) -> Tensor:
    """x (B, C, 2, 2), w (O, C, 3, 3), stride 1, padding 1 -> (B, O, 2, 2), channels_last."""
    y = _by_pixel(x) @ _matrix(w).t()
    return y.view(len(x), len(w), SIDE, SIDE).contiguous(memory_format=torch.channels_last)


def input_gradient(g: Tensor, w: Tensor) -> Tensor:
    """Of `convolve` for output-gradients g (B, O, 2, 2) -> (B, C, 2, 2), channels_last."""
    gx = _by_channel(g) @ _matrix(w)
    return gx.view(len(g), SIDE, SIDE, w.shape[1]).permute(0, 3, 1, 2)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Of `convolve` for output-gradients g (B, O, 2, 2) -> (O, C, 3, 3), channels_last."""
    matrix = (_by_channel(g).t() @ _by_pixel(x)).view(g.shape[1], SIDE**4, x.shape[1])
    return (PLACES.t().to(g.dtype) @ matrix).view(g.shape[1], 3, 3, x.shape[1]).permute(0, 3, 1, 2)


def _matrix(w: Tensor) -> Tensor:
    """M: w (O, C, 3, 3) -> (O 4, 4 C)."""
    out, channels = w.shape[:2]
    taps = w.permute(0, 2, 3, 1).reshape(out, 9, channels)
    return taps.index_select(1, TAPS).view(out * SIDE**2, SIDE**2 * channels)


def _by_pixel(x: Tensor) -> Tensor:
    """(B, C, 2, 2) -> (B, 4 C)."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1)


def _by_channel(g: Tensor) -> Tensor:
    """(B, O, 2, 2) -> (B, O 4)."""
    return g.reshape(len(g), -1)
