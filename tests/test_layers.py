"""Fast layers against autograd's own double backward, in float64."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from families import FAMILIES, family
from make_library_table import twice_differentiable
from tiny import randomised
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torchvision.models import vgg as tv_vgg

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.hardware import native_bf16
from gradexp.layers import batch_norm, convolution, ranks
from gradexp.models.resnet import ResNet
from gradexp.models.vgg import VGG

DOUBLE = torch.float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=True)


@pytest.mark.parametrize("shape", [((1, 1), (1, 1), (1, 1), 1), ((2, 2), (1, 1), (1, 1), 1), ((1, 1), (0, 0), (2, 2), 2)])
def test_convolution_is_differentiable_twice(shape: convolution.Shape) -> None:
    x, w, b = randn(2, 4, 6, 5), randn(6, 4 // shape[3], 3, 3), randn(6)
    function = lambda x, w, b: convolution.Convolve.apply(x, w, b, shape)
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (1, 2, 0), (3, 2, (0, 1)), ((2, 3), (1, 2), (2, 1))])
def test_weight_gradients_of_small_maps(
    kernel: Any, stride: Any, padding: Any, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from one matrix product instead of the CPU's kernel."""
    calls = []
    product = convolution._weight_by_matmul
    monkeypatch.setattr(convolution, "_weight_by_matmul", lambda *given: calls.append(1) or product(*given))
    stock = nn.Conv2d(3, 5, kernel, stride, padding, dtype=DOUBLE).to(memory_format=memory_format)
    fast = copy.deepcopy(stock)
    layers.accelerate(fast)
    x = torch.randn(4, 3, 4, 4, dtype=DOUBLE).to(memory_format=memory_format)
    found = []
    for layer in (stock, fast):
        images = x.clone().requires_grad_()
        layer(images).pow(3).sum().backward()
        found.append([images.grad, layer.weight.grad, layer.bias.grad])
    assert calls == [1]
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_batch_norm_is_differentiable_twice() -> None:
    x, w, b = randn(4, 3, 3, 2), randn(3), randn(3)
    function = lambda x, w, b: batch_norm.NormaliseBatch.apply(x, w, b, (None, None), 0.1, 1e-5)[0]
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))


def plain_batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return w.view(-1, 1, 1) * (x - mean) / (variance + 1e-5).sqrt() + b.view(-1, 1, 1)


def test_batch_norm_is_differentiable_three_times() -> None:
    """A training step with exact Hessian-vector products asks for that; torch's own layer can't."""
    start = (randn(4, 2, 2, 2), randn(2), randn(2))
    third = []
    for fast in (True, False):
        x, w, b = (tensor.detach().clone().requires_grad_() for tensor in start)
        y = batch_norm.NormaliseBatch.apply(x, w, b, (None, None), 0.1, 1e-5)[0] if fast else plain_batch_norm(x, w, b)
        with layers.only_inputs():
            (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            (product,) = torch.autograd.grad(gradient, x, torch.ones_like(x).tril(), create_graph=True)
        third.append(torch.autograd.grad(product.square().sum(), (x, w, b)))
    torch.testing.assert_close(third[0], third[1], rtol=1e-9, atol=1e-12)


def test_parameters_of_batch_norm_have_derivatives_of_any_order() -> None:
    """Also the gradient of the weight, which no penalty differentiates."""
    start, found = (randn(3, 2, 2, 2), randn(2), randn(2)), []
    for layer in (lambda *x: batch_norm.NormaliseBatch.apply(*x, (None, None), 0.1, 1e-5)[0], plain_batch_norm):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in start]
        value = layer(*tensors).pow(3).sum()
        for _ in range(4):
            value = sum(
                each.square().sum() for each in torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
            )
        found.append(value)
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_max_pool_is_differentiable_twice(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=DOUBLE).to(memory_format=memory_format).requires_grad_()
    function = lambda x: layers.MaxPool(2)(x) ** 2
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("beta", [10, -2])
def test_softplus_is_differentiable_three_times(beta: float) -> None:
    x = randn(40)
    function = lambda x: layers.Softplus(beta=beta)(x)
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
    third = [
        torch.autograd.functional.hessian(lambda x, f=f: torch.autograd.grad(f(x).sum(), x, create_graph=True)[0].sum(), x)
        for f in (function, nn.Softplus(beta=beta))
    ]
    torch.testing.assert_close(third[0], third[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_softplus_has_the_derivatives_of_torchs_beyond_the_threshold_too(dtype: torch.dtype, error: float) -> None:
    """First and second, whatever the layouts of what comes down; torch's in float64 are the truth."""
    x = torch.linspace(-1, 3, 96, dtype=dtype).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    g, v = torch.randn(2, 2, 3, 4, 4, dtype=DOUBLE).to(dtype)
    found = []
    for layer, wide in ((layers.Softplus(beta=10), False), (nn.Softplus(beta=10), True)):
        at, down, across = (tensor.double() if wide else tensor for tensor in (x, g, v))
        at, down = at.requires_grad_(), down.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(at), at, down, create_graph=True)
        found.append((first.detach(), *torch.autograd.grad(first, (at, down), across)))
    for ours, truth in zip(*found, strict=True):
        assert (ours.double() - truth).abs().max() <= error * truth.abs().max()


def test_ties_are_broken_as_torch_does() -> None:
    x = torch.ones(1, 1, 4, 4, dtype=DOUBLE, requires_grad=True)
    fast, stock = (torch.autograd.grad(pool(x).sum(), x)[0] for pool in (layers.MaxPool(2), nn.MaxPool2d(2)))
    assert torch.equal(fast, stock)


class Residual(nn.Module):
    """Strided and 1x1 convolutions, a residual sum, softplus, dropout in eval: what ResNets are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down, self.norm2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.skip, self.norm3 = nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.pool, self.act, self.linear = nn.MaxPool2d(3, stride=2, padding=1), nn.Softplus(beta=10), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm1(self.stem(x))))
        x = self.act(self.norm2(self.down(x)) + self.norm3(self.skip(x)))
        return self.linear(x.mean((2, 3)))


def vgg() -> nn.Module:
    return VGG(name="t", layers=[4, "M", 5, 6, "M"], width=1, channels=2, classes=3, dropout=None)


def resnet() -> nn.Module:
    return ResNet(name="r", blocks=[1, 1], width=4 / 64, channels=2, classes=3, activation=lambda: nn.Softplus(beta=10))


def small(name: str, experiment: str = "teacher", **changes: Any) -> Callable[[], nn.Module]:
    """A network of conf/model/, narrow."""
    words = [f"experiment={experiment}", f"model={name}", "scale=quick", "scale.width=0.0625"]

    def make() -> nn.Module:
        node = compose_run(words)["model"] | {"channels": 2, "classes": 3} | changes
        model: nn.Module = build(node, where="model")
        return model

    make.__name__ = f"{name}{'-'.join(changes)}"
    return make


def torchvision_vgg16() -> nn.Module:
    """torchvision's VGG-16-BN with few channels: in-place ReLUs, adaptive pooling, dropout between linear layers."""
    channels = [value if value == "M" else value // 32 for value in tv_vgg.cfgs["D"]]  # type: ignore[operator]
    model = tv_vgg.VGG(tv_vgg.make_layers(channels, batch_norm=True), num_classes=3)  # type: ignore[arg-type]
    model.features[0] = nn.Conv2d(2, 2, 3, padding=1)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0], model.classifier[3], model.classifier[6] = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 3)
    return model


def torchvision_resnet34() -> nn.Module:
    model = torchvision.models.resnet34(num_classes=3)
    model.conv1 = nn.Conv2d(2, 64, 7, stride=2, padding=3, bias=False)
    return model


def made(make: Callable[[], nn.Module], training: bool) -> nn.Module:
    torch.manual_seed(5)
    return randomised(make()).train(training)


def penalised(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Value, input-gradient, parameter gradients and buffers of one step with a gradient penalty."""
    torch.manual_seed(0)  # dropout
    images = images.requires_grad_()
    logits = model(images)
    with layers.only_inputs():
        (gradient,) = torch.autograd.grad(logits[:, 1].sum(), images, create_graph=True)
    loss = logits.square().mean() + (gradient - 0.1).square().sum()
    loss.backward()
    found = {"loss": loss.detach(), "gradient": gradient.detach(), **dict(model.named_buffers())}
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[dict-item]


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("make", [vgg, Residual, resnet])
def test_a_penalised_step_agrees_with_autograd(
    make: Callable[[], nn.Module], memory_format: torch.memory_format, training: bool
) -> None:
    agree(made(make, training), size=8, memory_format=memory_format)


RELU = {"activation": {"_target_": "torch.nn.ReLU", "_partial_": True}}
EVERY = [
    *(small(f"vgg{depth}") for depth in (4, 6, 9, 11)),
    small("vgg9", dropout=0.5),
    small("resnet18"),
    small("resnet18", **RELU),
    small("resnet34", stem_stride=2),
    small("vgg11_softplus"),
    small("vgg9_two_heads", "jacobian_transfer"),
]


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("make", [*EVERY, torchvision_vgg16, torchvision_resnet34], ids=lambda make: make.__name__)
def test_every_model_of_the_suite_agrees_with_autograd(make: Callable[[], nn.Module], training: bool) -> None:
    agree(made(make, training), size=32, memory_format=torch.channels_last)


def agree(stock: nn.Module, size: int, memory_format: torch.memory_format) -> None:
    """Values, input-gradients, parameter gradients and buffers of the fast layers are autograd's, to a relative 1e-9."""
    stock = stock.to(memory_format=memory_format)
    fast = layers.accelerate(copy.deepcopy(stock))
    images = torch.randn(4, 2, size, size, dtype=DOUBLE).to(memory_format=memory_format)
    expected, found = (penalised(model, images.clone(memory_format=torch.preserve_format)) for model in (stock, fast))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("name", FAMILIES)
def test_accelerate_is_exact_on_every_family(name: str, training: bool) -> None:
    """Values, input-gradients, second derivatives and buffers, also where torch itself has no second derivative."""
    stock, images = family(name)
    fast = layers.accelerate(copy.deepcopy(stock)).train(training)
    twice_differentiable(stock)
    with sdpa_kernel(SDPBackend.MATH):
        expected = penalised(stock.train(training), images.clone())
    found = penalised(fast, images.clone())
    assert found.keys() == expected.keys()
    assert [key for key, value in found.items() if value is None] == [key for key, value in expected.items() if value is None]
    # A bias in front of a batch normalisation has no gradient but rounding, relative to the other parameters' gradients.
    scale = max(float(value.abs().max()) for value in expected.values() if value is not None)
    for key, value in expected.items():
        if value is not None:
            torch.testing.assert_close(
                found[key], value, rtol=1e-6, atol=1e-9 * scale, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_accelerate_takes_networks_only() -> None:
    with pytest.raises(UserError, match=r"accelerate takes a network \(nn\.Module\), got function"):
        layers.accelerate(lambda images: images)  # type: ignore[arg-type]


def test_accelerate_changes_the_layout_of_an_accelerated_network() -> None:
    model = layers.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3)))
    for channels_last in (False, True):
        layers.accelerate(model, channels_last=channels_last)
        for tensor in (model[0].weight, model(torch.randn(2, 3, 6, 6))):
            assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_without_channels_last_the_layout_of_a_stock_network_stays() -> None:
    stock = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weight = layers.accelerate(stock, channels_last=False)[0].weight  # type: ignore[index]
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_autocast_casts_what_it_casts_for_a_stock_convolution(dtype: torch.dtype) -> None:
    """Float64 stays what it is."""
    stock = nn.Conv2d(3, 4, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model(torch.ones(2, 3, 6, 6, dtype=dtype)) for model in (stock, layers.accelerate(copy.deepcopy(stock)))]
    torch.testing.assert_close(outputs[1], outputs[0])


def test_an_empty_batch_has_a_second_derivative() -> None:
    images = torch.randn(0, 3, 8, 8, requires_grad=True)
    model = layers.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)))
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert images.grad is not None and images.grad.shape == images.shape


def test_accelerate_keeps_names(caplog: pytest.LogCaptureFixture) -> None:
    model = Residual()
    model.norm4 = nn.GroupNorm(2, 6)
    before = copy.deepcopy(model.state_dict())
    layers.accelerate(model)
    assert type(model.stem) is layers.Convolution
    assert "GroupNorm" in caplog.text
    assert "Conv2d" not in caplog.text
    assert model.state_dict().keys() == before.keys()


class OneByOne(nn.Module):
    """Takes the images of a batch one after another, as (C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.linear = nn.Conv2d(2, 6, 3), nn.MaxPool2d(2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(self.pool(functional.silu(self.conv(image))).mean((1, 2))) for image in x])


def test_maps_without_a_batch_agree_with_autograd() -> None:
    model = OneByOne().double()
    agree(model, 8, torch.contiguous_format)
    with pytest.raises(ValueError, match="expected 4D input"):
        layers.accelerate(nn.BatchNorm2d(3))(torch.randn(3, 4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_network_has_torchs_second_derivatives(training: bool) -> None:
    """A traced Function loses the graph of its gradient, and with it a part of the derivative of a penalty."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
        *(nn.Softplus(), nn.Flatten(), nn.Linear(16, 3)),
    )
    model, images = randomised(model).double().train(training), torch.randn(3, 3, 10, 10, dtype=DOUBLE)
    compiled = torch.compile(layers.accelerate(copy.deepcopy(model)), backend="eager")
    expected, found = penalised(model, images.clone()), penalised(compiled, images.clone())
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, found.get(f"_orig_mod.{name}")), value, rtol=1e-9, atol=1e-11)


def test_layers_whose_weights_are_computed_are_left_alone_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    prune.l1_unstructured(model[1], "weight", 0.5)
    layers.accelerate(model)
    assert [type(module) for module in model] == [layers.Convolution, nn.Conv2d]
    assert "slower" in caplog.text and "Conv2d" in caplog.text


@pytest.mark.parametrize("which", ["weight", "bias"])
@pytest.mark.parametrize("layer", [lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(3)], ids=["convolution", "batch norm"])
def test_the_gradient_of_a_parameter_that_is_computed_from_the_images_is_not_skipped(
    layer: Callable[[], nn.Module], which: str
) -> None:
    """`only_inputs` skips gradients of parameters; this is none."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()
            nn.init.normal_(self.layer.bias)

        def forward(self, x: Tensor) -> Tensor:
            parameters = dict(self.layer.named_parameters())
            parameters[which] = parameters[which] * (1 + x.square().mean())
            return functional_call(self.layer, parameters, (x,)).square().mean((2, 3))  # type: ignore[no-any-return]

    model, images = Hyper().double(), torch.randn(2, 3, 6, 6, dtype=DOUBLE)
    expected = gradients.input_gradient(copy.deepcopy(model), images, 1)
    torch.testing.assert_close(gradients.input_gradient(layers.accelerate(model), images, 1), expected)


def test_batch_norm_in_training_needs_two_values_a_channel() -> None:
    """Of one value the variance is 0 / 0, which would stay in the running statistics."""
    for layer in (nn.BatchNorm2d(3), layers.accelerate(nn.BatchNorm2d(3)), ranks.share_layers(nn.BatchNorm2d(3))):
        layer(torch.randn(1, 3, 1, 2))
        with pytest.raises(ValueError, match=r"more than (1|one) value"):
            layer(torch.randn(1, 3, 1, 1))
        assert layer.running_var.isfinite().all()
        layer.eval()(torch.randn(1, 3, 1, 1))


def test_batch_norm_of_no_images_is_torchs() -> None:
    assert layers.accelerate(nn.BatchNorm2d(3))(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_layouts_may_be_left_alone() -> None:
    """`view` refuses a map in channels_last, as the ones of networks of torch's tutorials, and their gradients."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.linear = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Linear(36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.pool(self.conv(x)).view(-1, 36))  # type: ignore[no-any-return]

    stock, images = Viewing().double(), randn(2, 3, 8, 8)
    model = layers.accelerate(copy.deepcopy(stock), channels_last=False)
    for network in (stock, model):
        (slope,) = torch.autograd.grad(network(images).square().sum(), images, create_graph=True)
        slope.square().sum().backward()
    ours, torchs = (torch.cat([each.grad.view(-1) for each in network.parameters()]) for network in (model, stock))
    torch.testing.assert_close(ours, torchs)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        layers.accelerate(copy.deepcopy(stock))(images)


class WeightStandardised(nn.Conv2d):
    """A subclass, as timm's StdConv2d."""


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(*self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def test_accelerate_names_subclasses_and_attention_that_it_leaves_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(WeightStandardised(2, 6, 3), OwnAttention(), nn.Flatten(), nn.Linear(24, 3)).double()
    images = torch.randn(2, 2, 4, 4, dtype=DOUBLE)
    expected = model(images)
    layers.accelerate(model)
    torch.testing.assert_close(model(images), expected)
    slow, attention = (record.getMessage() for record in caplog.records)
    assert slow == "autograd's own double backward for WeightStandardised: exact, but slower"
    assert re.fullmatch(r"OwnAttention calls scaled_dot_product_attention.*sdpa_kernel\(SDPBackend.MATH\)", attention)

    def penalty() -> Tensor:
        inputs = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs)[:, 0].sum(), inputs, create_graph=True)
        return gradient.square().sum()

    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        penalty().backward()  # type: ignore[no-untyped-call]
    with sdpa_kernel(SDPBackend.MATH):
        penalty().backward()  # type: ignore[no-untyped-call]
    caplog.clear()
    layers.accelerate(model)
    layers.accelerate(nn.Sequential(nn.Conv2d(2, 6, 3), nn.MultiheadAttention(6, 2)))
    assert "Conv2d" not in caplog.text.replace("WeightStandardised", "") and "Multihead" not in caplog.text


def test_batch_norm_by_running_statistics_rounds_once() -> None:
    """In bf16, its error is that of the stock layer: the channels' numbers are not rounded."""
    stock = randomised(nn.BatchNorm2d(64)).float()
    x = torch.randn(8, 64, 4, 4).bfloat16()
    exact = stock(x.float())
    errors = [(layer(x).float() - exact).norm().item() for layer in (stock, layers.accelerate(copy.deepcopy(stock)))]
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.skipif(not native_bf16("cpu"), reason="torch's emulation of bf16 convolutions corrupts memory")
@pytest.mark.parametrize("make", [vgg, resnet])
def test_bf16_errs_no_more_than_autograd_does(make: Callable[[], nn.Module]) -> None:
    """Against float32, the fast layers' error under autocast is at most 1.5 times the stock layers'."""
    stock = made(make, True).float().to(memory_format=torch.channels_last)
    images = torch.randn(16, 2, 8, 8).to(memory_format=torch.channels_last)
    exact = penalised(copy.deepcopy(stock), images.clone(memory_format=torch.preserve_format))
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = (
            penalised(model, images.clone(memory_format=torch.preserve_format))
            for model in (layers.accelerate(copy.deepcopy(stock)), stock)
        )
    for name in ("gradient", *(name for name, _ in stock.named_parameters() if name.endswith("weight"))):
        errors = [((found[name].float() - exact[name]).norm() / exact[name].norm()).item() for found in (fast, slow)]
        assert errors[0] < 1.5 * errors[1] + 0.01, f"{name}: {errors}"
