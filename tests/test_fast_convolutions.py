"""Minimal filtering, and 2 x 2 maps as one matrix product, against torch's own convolution."""

import copy
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import layers
from gradexp.engine.run import ROOT
from gradexp.layers import convolution, dense, tiles, winograd

NAMES = ("convolve", "input_gradient", "weight_gradient")
SIDES = pytest.mark.parametrize(("module", "side"), [(winograd, 8), (dense, 2)], ids=["winograd", "dense"])


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def products(module: ModuleType, g: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    return [module.convolve(x, w), module.input_gradient(g, w), module.weight_gradient(g, x)]


def stock_products(g: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = functional.conv2d(x, w, padding=1)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ModuleType, str]]:
    """The products that are called from now on."""
    calls: list[tuple[ModuleType, str]] = []
    for module in (winograd, dense):
        for name in NAMES:
            product = getattr(module, name)
            record = lambda *given, call=(module, name), product=product: calls.append(call) or product(*given)
            monkeypatch.setattr(module, name, record)
    return calls


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        *((winograd, shape) for shape in [(1, 1, 1, 4, 4), (3, 5, 7, 8, 4), (2, 6, 3, 4, 12)]),
        *((dense, (*shape, 2, 2)) for shape in [(1, 1, 1), (3, 4, 5), (2, 6, 3)]),
    ],
)
def test_all_three_products_are_exact(module: ModuleType, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    batch, channels, out, height, width = shape
    w = torch.randn(out, channels, 3, 3, dtype=torch.float64).to(memory_format=layout)
    x, g = last(batch, channels, height, width, dtype=w.dtype), torch.randn(batch, out, height, width, dtype=w.dtype)
    g = g.to(memory_format=layout)
    found = products(module, g, x, w)
    tolerance = 1e-11 if module is winograd else 1e-12
    torch.testing.assert_close(found, stock_products(g, x, w), rtol=tolerance, atol=tolerance)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)


@pytest.mark.parametrize(("module", "side"), [(winograd, 4), (dense, 2)], ids=["winograd", "dense"])
def test_fp32_errs_little(module: ModuleType, side: int) -> None:
    """By the norm of the error at 512 channels; the weight-gradient of torch's kernel errs by as much."""
    g, x, w = last(128, 512, side, side), last(128, 512, side, side), last(512, 512, 3, 3)
    exact = stock_products(g.double(), x.double(), w.double())
    for found, expected in zip(products(module, g, x, w), exact, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("module", "x", "w"),
    [
        (winograd, (32, 64, 4, 4), (128, 64, 3, 3)),
        (None, (128, 64, 4, 4), (64, 64, 3, 3)),
        (None, (128, 127, 4, 4), (64, 127, 3, 3)),
        (None, (31, 128, 4, 4), (128, 128, 3, 3)),
        (None, (128, 128, 6, 4), (128, 128, 3, 3)),
        (winograd, (128, 128, 16, 16), (128, 128, 3, 3)),
        (None, (128, 128, 20, 16), (128, 128, 3, 3)),
        (dense, (64, 128, 2, 2), (128, 128, 3, 3)),
        (None, (128, 64, 2, 2), (128, 64, 3, 3)),
        (None, (128, 128, 2, 2), (64, 128, 3, 3)),
        (None, (63, 128, 2, 2), (128, 128, 3, 3)),
        (None, (128, 128, 2, 4), (128, 128, 3, 3)),
    ],
)
def test_sizes_decide(module: ModuleType | None, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    assert convolution._faster(last(*x), torch.empty(w), convolution.SAME) is module


@SIDES
def test_all_but_plain_convolutions_in_fp32_are_left_to_torch(module: ModuleType, side: int) -> None:
    x, w = last(128, 128, side, side), torch.empty(128, 128, 3, 3)
    assert convolution._faster(x, w, convolution.SAME) is module
    assert convolution._faster(x.contiguous(), w, convolution.SAME) is None
    assert convolution._faster(x.bfloat16(), w.bfloat16(), convolution.SAME) is None
    assert convolution._faster(x.double(), w.double(), convolution.SAME) is None
    assert convolution._faster(x.to("meta"), w.to("meta"), convolution.SAME) is None
    assert convolution._faster(x, torch.empty(128, 128, 1, 1), convolution.SAME) is None
    for shape in (((2, 2), (1, 1), (1, 1), 1), ((1, 1), (0, 0), (1, 1), 1), ((1, 1), (2, 2), (1, 1), 1)):
        assert convolution._faster(x, w, shape) is None
    assert convolution._faster(last(128, 256, side, side), w, ((1, 1), (1, 1), (1, 1), 2)) is None


@SIDES
def test_a_layer_takes_its_values_and_gradients_from_them(
    module: ModuleType, side: int, used: list[tuple[ModuleType, str]]
) -> None:
    """Its bias included."""
    stock = nn.Conv2d(128, 160, 3, padding=1).to(memory_format=torch.channels_last)
    fast = layers.accelerate(nn.Sequential(copy.deepcopy(stock)))
    images = last(64, 128, side, side)

    def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
        y = layer(x.requires_grad_())
        return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters()))]

    found, exact = gradients(fast, images.clone()), gradients(stock.double(), images.double())
    assert sorted(used, key=str) == [(module, name) for name in NAMES]
    for one, right in zip(found, exact, strict=True):
        assert (one - right).norm() < 1e-5 * right.norm()


@SIDES
def test_a_penalised_step_agrees_with_autograd(module: ModuleType, side: int, used: list[tuple[ModuleType, str]]) -> None:
    """Once through every product that a gradient penalty needs: value, input-gradient, and the weights' gradient of both."""
    stock = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 160, 3, padding=1), nn.BatchNorm2d(160), nn.ReLU())
    stock.to(memory_format=torch.channels_last)
    images = last(64, 3, side, side)

    def gradients(model: nn.Module, dtype: torch.dtype) -> Tensor:
        x = images.to(dtype).requires_grad_()
        model.to(dtype)
        with layers.only_inputs():
            (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    found, exact = gradients(layers.accelerate(copy.deepcopy(stock)), torch.float32), gradients(stock, torch.float64)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    # The output, the input-gradient and their backward passes: that of a product is made of the two others.
    assert [used.count((module, name)) for name in NAMES] == [2, 2, 2]
    assert len(used) == 6


def test_a_number_that_is_none_stays_one() -> None:
    """A diverged run must not be mended by a compiler's liberties."""
    g, x, w = last(1, 2, 8, 8), last(1, 3, 8, 8), last(2, 3, 3, 3)
    x[0, 1, 3, 3] = torch.nan
    y, gx, gw = products(winograd, g, x, w)
    assert y[0, :, 2:5, 2:5].isnan().all()
    assert gx.isfinite().all()
    assert gw[:, 1].isnan().all()
    assert gw[:, 0].isfinite().all()


def test_threads_change_no_bit() -> None:
    x, m, back = last(5, 4, 8, 16), torch.randn(6, 6), torch.randn(4, 6)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 64):  # numba may have fewer, and takes what it has
            torch.set_num_threads(threads)
            planes = tiles.split(x, m, pixels=4)
            found.append((planes, tiles.join(planes, back, (5, 8, 16))))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=0, atol=0)


def test_the_compiler_is_loaded_when_it_is_needed() -> None:
    code = "import sys, gradexp.layers, gradexp.training.classifier; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_the_compiler_torchs_kernels_are_used_and_it_is_said_once() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from gradexp.layers import convolution, winograd; winograd.find_spec = lambda name: None\n"
        "x = torch.randn(64, 128, 8, 8).contiguous(memory_format=torch.channels_last); w = torch.randn(128, 128, 3, 3)\n"
        "for _ in range(2): y = convolution._convolve(x, w, None, convolution.SAME)\n"
        "assert torch.allclose(y, torch.conv2d(x, w, padding=1), atol=1e-3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.count("numba is not installed") == 1


def test_no_more_threads_than_torch_has() -> None:
    """One more, waiting in a loop on a core of another run, halves the speed of both."""
    code = (
        "import torch; torch.set_num_threads(1); from gradexp.layers import tiles; from numba.np.ufunc import parallel\n"
        "tiles.split(torch.ones(1, 1, 4, 4), torch.ones(6, 6), 4); print(parallel.NUM_THREADS, torch.get_num_threads())"
    )
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}  # as a command inherits it from one that had more
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "1"]


OTHERS = """
import numba, numpy

@numba.njit(parallel=True)
def started(values):
    for i in numba.prange(len(values)):
        values[i] += 1
    return values

started(numpy.zeros(8))
import torch
torch.set_num_threads(numba.get_num_threads() + 1)
from gradexp.layers import winograd
x, w = torch.randn(2, 8, 8, 8), torch.randn(8, 8, 3, 3)
torch.testing.assert_close(winograd.convolve(x, w), torch.conv2d(x, w, padding=1), rtol=1e-4, atol=1e-4)
"""


def test_a_program_may_use_numba_before() -> None:
    """Numba refuses another number of threads once its own run; the loops then run on as many as it has."""
    subprocess.run([sys.executable, "-c", OTHERS], check=True, cwd=ROOT, timeout=120)
