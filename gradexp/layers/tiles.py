"""The tile transforms of winograd.py as compiled loops: a tile is read once, transformed in the cache, and written once.

As products of small matrices they took 1.6 to 3 times as long. Numba compiles them at first use, in about ten seconds, and
keeps the result beside this file. Arrays are channels last: (B, H, W, C).
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Read once, by numba's import. Threads beyond torch's would wait in a loop, on a core that another run may need.
if "numba" not in sys.modules:  # where it is, it has read this, and refuses another number once its threads run
    os.environ["NUMBA_NUM_THREADS"] = str(torch.get_num_threads())
import numba

Array = Any  # numba compiles a loop for each type that it is called with

# "contract" allows fused multiply-adds and nothing else: a NaN stays one.
_loop = numba.njit(parallel=True, cache=True, fastmath={"contract"})


@numba.njit(inline="always")
def _combine(m: Array, x: Array, y: Array) -> None:
    """y = m x, for m (r, k) with a few entries in each row that are not 0, x (k, n) and y (r, n), which is overwritten."""
    for r in range(m.shape[0]):
        first = True
        for k in range(m.shape[1]):
            factor = m[r, k]
            if factor == 0:
                continue
            if first:
                for c in range(x.shape[1]):
                    y[r, c] = factor * x[k, c]
                first = False
            else:
                for c in range(x.shape[1]):
                    y[r, c] += factor * x[k, c]


@_loop
def _split(m: Array, x: Array, out: Array) -> None:
    """See `split`. x (B, H, W, C), out (B, down, across, s, s, C)."""
    height, width, channels = x.shape[1:]
    down, across = out.shape[1:3]
    size, side = m.shape
    pixels = height // down
    margin = (side - pixels) // 2
    for row in numba.prange(x.shape[0] * down):
        image, i = row // down, row % down
        tile = np.empty((side, side, channels), x.dtype)
        half = np.empty((size, side, channels), x.dtype)
        for j in range(across):
            for p in range(side):
                for q in range(side):
                    y, z = pixels * i + p - margin, pixels * j + q - margin
                    inside = 0 <= y < height and 0 <= z < width
                    for c in range(channels):
                        tile[p, q, c] = x[image, y, z, c] if inside else 0
            _combine(m, tile.reshape(side, side * channels), half.reshape(size, side * channels))
            for p in range(size):
                _combine(m, half[p], out[image, i, j, p])


@_loop
def _join(m: Array, planes: Array, out: Array) -> None:
    """See `join`. planes (s s, tiles, C), out (B, H, W, C)."""
    pixels, size = m.shape
    channels = out.shape[3]
    down, across = out.shape[1] // pixels, out.shape[2] // pixels
    for row in numba.prange(out.shape[0] * down):
        image, i = row // down, row % down
        tile = np.empty((size, size, channels), planes.dtype)
        half = np.empty((pixels, size, channels), planes.dtype)
        for j in range(across):
            for p in range(size):
                for q in range(size):
                    for c in range(channels):
                        tile[p, q, c] = planes[size * p + q, row * across + j, c]
            _combine(m, tile.reshape(size, size * channels), half.reshape(pixels, size * channels))
            for p in range(pixels):
                _combine(m, half[p], out[image, pixels * i + p, pixels * j : pixels * (j + 1)])


def split(x: Tensor, m: Tensor, pixels: int) -> Tensor:
    """m t mᵀ of every tile t: x (B, C, H, W), m (s, k) -> (s s, tiles, C), its planes one row of channels apart in memory.

    Tiles begin every `pixels` pixels. Where k is larger, they overlap evenly, and are 0 beyond the edges of x.
    """
    batch, channels, height, width = x.shape
    size = len(m)
    out = torch.empty(batch, height // pixels, width // pixels, size, size, channels, dtype=x.dtype)
    _like_torch()
    _split(m.numpy(), x.permute(0, 2, 3, 1).contiguous().numpy(), out.numpy())
    return out.view(-1, size**2, channels).transpose(0, 1)


def join(planes: Tensor, m: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """m t mᵀ of every tile t, side by side: planes (s s, tiles, C), m (k, s) -> (B, C, H, W), channels_last.

    shape: B, H and W, the latter two multiples of k.
    """
    out = torch.empty(*shape, planes.shape[2], dtype=planes.dtype)
    _like_torch()
    _join(m.numpy(), planes.contiguous().numpy(), out.numpy())
    return out.permute(0, 3, 1, 2)


def _like_torch() -> None:
    """As many threads as torch."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
