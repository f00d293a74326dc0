"""Convolutions of 2 x 2 maps as one matrix product, against torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gradexp import dense, layers

SAME = ((1, 1), (1, 1), (1, 1), 1)


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("batch", "channels", "out"), [(1, 1, 1), (3, 4, 5), (2, 6, 3)])
def test_all_three_products_are_exact(batch: int, channels: int, out: int, layout: torch.memory_format) -> None:
    x, w = last(batch, channels, 2, 2, dtype=torch.float64), torch.randn(out, channels, 3, 3, dtype=torch.float64)
    g, w = torch.randn(batch, out, 2, 2, dtype=torch.float64).to(memory_format=layout), w.to(memory_format=layout)
    found = [dense.convolve(x, w), dense.input_gradient(g, w), dense.weight_gradient(g, x)]
    x.requires_grad_(), w.requires_grad_()
    y = functional.conv2d(x, w, padding=1)
    torch.testing.assert_close(found, [y.detach(), *torch.autograd.grad(y, (x, w), g)], rtol=1e-12, atol=1e-12)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found)


@pytest.mark.parametrize(
    ("x", "w", "shape"),
    [
        ((128, 64, 2, 2), (128, 64, 3, 3), SAME),
        ((128, 128, 2, 2), (64, 128, 3, 3), SAME),
        ((63, 128, 2, 2), (128, 128, 3, 3), SAME),
        ((128, 128, 2, 4), (128, 128, 3, 3), SAME),
        ((128, 128, 2, 2), (128, 128, 1, 1), SAME),
        ((128, 128, 2, 2), (128, 128, 3, 3), ((2, 2), (1, 1), (1, 1), 1)),
        ((128, 128, 2, 2), (128, 128, 3, 3), ((1, 1), (2, 2), (1, 1), 1)),
        ((128, 256, 2, 2), (128, 128, 3, 3), ((1, 1), (1, 1), (1, 1), 2)),
    ],
)
def test_other_convolutions_are_left_to_torch(x: tuple[int, ...], w: tuple[int, ...], shape: layers.Shape) -> None:
    assert dense.suits(last(64, 128, 2, 2), torch.empty(128, 128, 3, 3), SAME)
    assert not dense.suits(last(*x), torch.empty(w), shape)


def test_other_tensors_are_left_to_torch() -> None:
    w = torch.empty(128, 128, 3, 3)
    assert not dense.suits(torch.randn(128, 128, 2, 2), w, SAME)
    assert not dense.suits(last(128, 128, 2, 2).bfloat16(), w.bfloat16(), SAME)
    assert not dense.suits(last(128, 128, 2, 2, dtype=torch.float64), w.double(), SAME)


def test_layers_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it suits, the layer's values, bias included, and both gradients come from it."""
    used: list[str] = []
    for name in ("convolve", "input_gradient", "weight_gradient"):
        product = getattr(dense, name)
        monkeypatch.setattr(dense, name, lambda *given, n=name, p=product: used.append(n) or p(*given))
    stock = torch.nn.Conv2d(128, 160, 3, padding=1).to(memory_format=torch.channels_last)
    fast = layers.accelerate(torch.nn.Sequential(torch.nn.Conv2d(128, 160, 3, padding=1)))
    fast.to(memory_format=torch.channels_last)
    fast[0].load_state_dict(stock.state_dict())
    images = last(64, 128, 2, 2)

    def gradients(layer: torch.nn.Module, x: Tensor) -> list[Tensor]:
        y = layer(x.requires_grad_())
        return [y.detach(), *torch.autograd.grad(y.pow(3).sum(), (x, *layer.parameters()))]

    found, exact = gradients(fast, images.clone()), gradients(stock.double(), images.double())
    assert sorted(used) == ["convolve", "input_gradient", "weight_gradient"]
    for one, right in zip(found, exact, strict=True):
        assert (one - right).norm() < 1e-5 * right.norm()
