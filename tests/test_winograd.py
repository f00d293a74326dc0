"""Minimal filtering against torch's own convolution."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import layers, winograd

SAME = ((1, 1), (1, 1), (1, 1), 1)


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def products(g: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    return [winograd.convolve(x, w), winograd.input_gradient(g, w), winograd.weight_gradient(g, x)]


def stock_products(g: Tensor, x: Tensor, w: Tensor) -> list[Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = functional.conv2d(x, w, padding=1)
    return [y.detach(), *torch.autograd.grad(y, (x, w), g)]


@pytest.mark.parametrize("shape", [(1, 1, 1, 4, 4), (3, 5, 7, 8, 4), (2, 6, 3, 4, 12)])
def test_all_three_products_are_exact(shape: tuple[int, ...]) -> None:
    batch, channels, out, height, width = shape
    w = torch.randn(out, channels, 3, 3, dtype=torch.float64)
    x, g = last(batch, channels, height, width, dtype=w.dtype), last(batch, out, height, width, dtype=w.dtype)
    found = products(g, x, w)
    torch.testing.assert_close(found, stock_products(g, x, w), rtol=1e-11, atol=1e-11)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)


def test_fp32_errs_little() -> None:
    """By the norm of the error at 512 channels; the weight-gradient of torch's kernel errs by as much."""
    g, x, w = last(128, 512, 4, 4), last(128, 512, 4, 4), last(512, 512, 3, 3)
    exact = stock_products(g.double(), x.double(), w.double())
    for found, expected in zip(products(g, x, w), exact, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("x", "w", "shape"),
    [
        ((128, 64, 4, 4), (64, 64, 3, 3), SAME),
        ((128, 127, 4, 4), (64, 127, 3, 3), SAME),
        ((31, 128, 4, 4), (128, 128, 3, 3), SAME),
        ((128, 128, 6, 4), (128, 128, 3, 3), SAME),
        ((128, 128, 20, 16), (128, 128, 3, 3), SAME),
        ((128, 128, 4, 4), (128, 128, 1, 1), SAME),
        ((128, 128, 4, 4), (128, 128, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
        ((128, 128, 4, 4), (128, 128, 3, 3), ((1, 1), (0, 0), (1, 1), 1)),
        ((128, 256, 4, 4), (128, 128, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
    ],
)
def test_other_convolutions_are_left_to_torch(x: tuple[int, ...], w: tuple[int, ...], shape: layers.Shape) -> None:
    assert winograd.suits(last(32, 64, 4, 4), torch.empty(128, 64, 3, 3), SAME)
    assert not winograd.suits(last(*x), torch.empty(w), shape)


def test_other_tensors_are_left_to_torch() -> None:
    w = torch.empty(128, 128, 3, 3)
    assert not winograd.suits(torch.randn(128, 128, 4, 4), w, SAME)
    assert not winograd.suits(last(128, 128, 4, 4).bfloat16(), w.bfloat16(), SAME)
    assert not winograd.suits(last(128, 128, 4, 4, dtype=torch.float64), w.double(), SAME)


def test_a_penalised_step_agrees_with_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once through every product that a gradient penalty needs: value, input-gradient, and the weights' gradient of both."""
    used: list[str] = []
    for name in ("convolve", "input_gradient", "weight_gradient"):
        product = getattr(winograd, name)
        monkeypatch.setattr(winograd, name, lambda *given, n=name, p=product: used.append(n) or p(*given))
    stock = nn.Sequential(nn.Conv2d(3, 128, 1), nn.Conv2d(128, 160, 3, padding=1), nn.BatchNorm2d(160), nn.ReLU())
    stock.to(memory_format=torch.channels_last)
    images = last(64, 3, 8, 8)

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
    assert (used.count("convolve"), used.count("input_gradient"), used.count("weight_gradient")) == (2, 2, 2)
