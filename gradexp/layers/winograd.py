"""3 x 3 convolutions with a quarter of the products: Winograd's minimal filtering F(4 x 4, 3 x 3).

A tile of 4 x 4 outputs d * w needs 6 x 6 inputs d and, taken directly, 144 products for each pair of channels. In

    d * w = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ d B)] A                                    (Lavin and Gray, CVPR 2016, §4.3)

the product ⊙ has 36, and over all channels and tiles it is 36 matrix products, at which processors are best. The
input-gradient is a convolution too, with the kernel turned; the weight-gradient is the transpose of the same expression.

In fp32 the rounding error is 3e-6 of the norm at 512 channels; that of ordinary kernels is 2e-7 to 6e-6, by processor and
memory layout.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

TILE = 4  # outputs of a tile, along one side

# The interpolation points are 0, 1, -1, 2, -2 and infinity.
Matrix = tuple[tuple[float, ...], ...]
B_T: Matrix = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G: Matrix = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
G_TURNED: Matrix = tuple(row[::-1] for row in G)  # for the kernel turned by half a circle
A_T: Matrix = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
A: Matrix = tuple(zip(*A_T, strict=True))

MIN_PAIRS, MAX_PIXELS, MIN_TILES = 64 * 128, 16 * 16, 32  # pairs of an input and an output channel


def suits(x: Tensor, w: Tensor) -> bool:
    """Whether this is the fastest way to convolve x (B, C, H, W) with w (O, C, 3, 3), as `convolve` does: by measurement.

    With fewer channels, larger maps or smaller batches the transforms cost more than the products they save.
    """
    batch, _, height, width = x.shape
    whole, tiles = height % TILE == width % TILE == 0, batch * (height // TILE) * (width // TILE)
    large = w.shape[0] * w.shape[1] >= MIN_PAIRS and height * width <= MAX_PIXELS and tiles >= MIN_TILES
    return whole and large and _compiler_installed()


@cache
def _compiler_installed() -> bool:
    """Whether Numba is there, which compiles the loops of tiles.py; says once what its absence costs."""
    found = find_spec("numba") is not None
    if not found:
        print("numba is not installed: 3x3 convolutions in fp32 take torch's slower CPU kernels; pip install 'gradexp[numba]'")
    return found


def convolve(x: Tensor, w: Tensor) -> Tensor:
    """x (B, C, H, W), w (O, C, 3, 3), stride 1, padding 1, H and W multiples of 4 -> (B, O, H, W), channels_last."""
    return _join(torch.bmm(_windows(x), _kernels(w, G).transpose(1, 2)), x)


def input_gradient(g: Tensor, w: Tensor) -> Tensor:
    """Of `convolve` for output-gradients g (B, O, H, W) -> (B, C, H, W), channels_last."""
    return _join(torch.bmm(_windows(g), _kernels(w, G_TURNED)), g)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """Of `convolve` for output-gradients g (B, O, H, W) -> (O, C, 3, 3), channels_last."""
    products = torch.bmm(_tiles(g).transpose(1, 2), _windows(x))
    w = _square(G, x.dtype).t() @ products.transpose(0, 1)
    return w.view(g.shape[1], 3, 3, x.shape[1]).permute(0, 3, 1, 2)


# Maps are transformed tile by tile in compiled loops, kernels by one matrix product. Both leave the 36 planes one row of
# channels apart, as the large products take them.


@cache
def _matrix(rows: Matrix, dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


@cache
def _square(rows: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix that does along both sides of a kernel what `rows` do along one."""
    one = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(one, one).to(dtype)


@cache
def _loops() -> ModuleType:
    """tiles.py, whose compiler is not loaded before it is needed."""
    from gradexp.layers import tiles

    return tiles


def _windows(x: Tensor) -> Tensor:
    """Bᵀ d B of every overlapping window: (B, C, H, W) -> (36, tiles, C)."""
    windows: Tensor = _loops().split(x, _matrix(B_T, x.dtype), TILE)
    return windows


def _kernels(w: Tensor, rows: Matrix) -> Tensor:
    """G w Gᵀ with the `rows` of G: (O, C, 3, 3) -> (36, O, C)."""
    out, channels = w.shape[:2]
    return (_square(rows, w.dtype) @ w.permute(0, 2, 3, 1).reshape(out, 9, channels)).transpose(0, 1)


def _tiles(g: Tensor) -> Tensor:
    """A g Aᵀ of every tile: (B, O, H, W) -> (36, tiles, O)."""
    tiles: Tensor = _loops().split(g, _matrix(A, g.dtype), TILE)
    return tiles


def _join(products: Tensor, like: Tensor) -> Tensor:
    """Aᵀ m A of every tile, put side by side: (36, tiles, O) -> (B, O, H, W) with B, H and W those of `like`."""
    batch, _, height, width = like.shape
    joined: Tensor = _loops().join(products, _matrix(A_T, products.dtype), (batch, height, width))
    return joined
