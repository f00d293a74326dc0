"""Full-gradients of any network: each operation's bias against finite differences, completeness, and what is refused."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from families import FAMILIES, family
from tiny import randomised
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.saliency import FullGrad, GradCAM, IntegratedGradients, ReferenceFullGrad, SmoothGrad

CHANNELS, SIZE = 4, 6


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


class Operation(nn.Module):
    """x (B, 4, 6, 6) -> the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = parameter(CHANNELS, CHANNELS, 3, 3), parameter(CHANNELS)
        self.mean, self.variance = parameter(CHANNELS), nn.Parameter(torch.rand(CHANNELS, dtype=torch.float64) + 0.5)
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).double()
        self.norm = nn.BatchNorm2d(CHANNELS).double()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True).double()

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.mean.detach(), self.variance.detach()


def squeeze_and_excite(op: Operation, x: Tensor) -> Tensor:
    return x * torch.sigmoid(op.conv(x.mean((2, 3), keepdim=True)))


def in_place(op: Operation, x: Tensor) -> Tensor:
    y = op.conv(x)
    y += x
    y.mul_(2)
    y.add_(1.5)
    return y.relu_()


def part_in_place(op: Operation, x: Tensor) -> Tensor:
    y = op.conv(x)
    y[:, :2] = torch.tanh(y[:, :2])
    y[:, 2] += 0.7
    y[:, 3].exp_()
    return y


def into_zeros(op: Operation, x: Tensor) -> Tensor:
    y = torch.ones_like(x)
    y[:, :3] = x[:, 1:].square()
    return y


def token(op: Operation, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([op.bias.expand(len(x), 1, CHANNELS), tokens], 1)
    mixed, _ = op.attention(tokens, tokens, tokens)
    return (tokens + mixed)[:, 1:].transpose(1, 2).reshape(x.shape)


def fused_attention(op: Operation, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return functional.scaled_dot_product_attention(tokens, 2 * tokens, tokens).transpose(1, 2).reshape(x.shape)


def standardised(op: Operation, x: Tensor) -> Tensor:
    weight = (op.weight - op.weight.mean((1, 2, 3), keepdim=True)) / op.weight.std((1, 2, 3), keepdim=True)
    return functional.conv2d(input=x, weight=weight, bias=op.bias, padding=1)


def gated(op: Operation, x: Tensor) -> Tensor:
    left, right = op.conv(x).chunk(2, 1)
    return torch.cat([left * right.sigmoid(), right], 1)


def twice(op: Operation, x: Tensor) -> Tensor:
    return op.conv(torch.relu(op.conv(x)))


def by_fourier_transform(op: Operation, x: Tensor) -> Tensor:
    """A filter, squares, biases and gates of complex values, and operations that are not holomorphic."""
    f = torch.fft.fft2(op.conv(x)) * torch.complex(op.weight[0, 0, 0, 0], op.bias[0])
    f = f * f + 0.1 * f + torch.complex(op.bias, op.mean).view(-1, 1, 1)
    f = f * f.abs().tanh() + f.conj()
    f[:, 0] *= 1j
    return torch.fft.ifft2(f).real + torch.fft.irfft2(torch.fft.rfft2(x).sigmoid(), s=x.shape[-2:]) + f.imag.sin()


def masked_attention(op: Operation, x: Tensor) -> Tensor:
    tokens = op.conv(x).flatten(2).transpose(1, 2)
    later = torch.ones(SIZE**2, SIZE**2).triu(1)
    scores = (tokens @ tokens.mT).masked_fill(later.bool(), float("-inf")) + later.masked_fill(later > 0, float("-inf"))
    return (scores.softmax(-1) @ tokens).mT.reshape(x.shape)


def into_unused_memory(op: Operation, x: Tensor) -> Tensor:
    y = torch.full_like(x, float("nan"))
    y[:, ::2], y[:, 1::2] = x[:, 1::2], op.conv(x)[:, ::2].exp()
    return y


def parameters_like_activations(op: Operation, x: Tensor) -> Tensor:
    """Parameters that take their shape or dtype from the images."""
    bias, shift = op.bias.view(-1, 1, 1).type_as(x), op.mean.view(-1, 1, 1).expand_as(x)
    y = functional.group_norm(functional.conv2d(x, op.weight.to(x), op.bias.to(x), padding=1) + bias, 2, op.mean.to(x))
    wide, y = torch.broadcast_tensors(op.bias.view(-1, 1, 1), y)
    return torch.cat([y * torch.ones_like(x, requires_grad=True) + wide, shift], 1)[:, 2:6].tanh()


def elu_of_selected_pixels(op: Operation, x: Tensor) -> Tensor:
    y = op.conv(x).clone()
    negative = y < 0
    y[negative] = y[negative].exp() - 1
    return y


def routed_tokens(op: Operation, x: Tensor) -> Tensor:
    tokens = x.flatten(2).mT
    routed, y = tokens[..., 0] > 0, tokens.clone()
    y[routed] = functional.linear(tokens[routed], op.weight[..., 0, 0], op.bias)
    return y.mT.reshape(x.shape)


def normalised_behind(same: Callable[[Tensor], Tensor]) -> Callable[[Operation, Tensor], Tensor]:
    return lambda op, x: op.norm(same(op.conv(x)))


def also_used_raw(op: Operation, x: Tensor) -> Tensor:
    y = op.conv(x)
    return op.norm(y) + y


OPERATIONS: dict[str, Callable[[Operation, Tensor], Tensor]] = {
    "convolution of single images": lambda op, x: torch.stack([op.conv(image).tanh() for image in x]),
    "called with a keyword": lambda op, x: op.conv(input=x),
    "convolution and normalisation": lambda op, x: op.norm(op.conv(x)),
    "convolution used beside its normalisation": also_used_raw,
    "functional normalisation": lambda op, x: functional.batch_norm(x, *op.statistics(), op.mean, op.bias),
    "normalisation by the batch": lambda op, x: functional.instance_norm(x, weight=op.mean, bias=op.bias),
    "layer norm": lambda op, x: functional.layer_norm(x, x.shape[1:]),
    "group norm": lambda op, x: functional.group_norm(x, 2, op.mean, op.bias),
    "local response": lambda op, x: functional.local_response_norm(x, 3),
    "softplus": lambda op, x: functional.softplus(x, beta=2),
    "gelu": lambda op, x: functional.gelu(x),
    "hardswish": lambda op, x: functional.hardswish(x, inplace=False),
    "silu in place": lambda op, x: functional.silu(op.conv(x), inplace=True),
    "relu6 in place": lambda op, x: functional.hardtanh(op.conv(x), 0.0, 1.0, True),
    "clamp": lambda op, x: op.conv(x).clamp(-0.3, 0.4),
    "softmax": lambda op, x: x.softmax(1),
    "product": lambda op, x: op.conv(x) * x,
    "product of three": lambda op, x: torch.einsum("bchw,bchw,bchw->bchw", x, op.conv(x), x),
    "quotient": lambda op, x: x / (1 + op.conv(x).square()),
    "normalised": lambda op, x: x / x.norm(dim=1, keepdim=True),
    "reciprocal": lambda op, x: 1 / (2 + x.tanh()),
    "constants": lambda op, x: (3 - 2 * x) / 4 + 5,
    "power": lambda op, x: x**3,
    "added parameter": lambda op, x: x + op.bias.view(-1, 1, 1),
    "prelu": lambda op, x: functional.prelu(x, op.bias),
    "maximum with a constant": lambda op, x: torch.maximum(x, torch.full_like(x, 0.2)),
    "where": lambda op, x: torch.where(x > 0, x.sin(), x),
    "padding with ones": lambda op, x: functional.conv2d(functional.pad(x, (1, 1, 1, 1), value=1.0), op.weight),
    "resized": lambda op, x: functional.interpolate(functional.max_pool2d(x, 2), scale_factor=2.0, mode="bilinear"),
    "squeeze and excite": squeeze_and_excite,
    "in place": in_place,
    "in place in a part": part_in_place,
    "written into ones": into_zeros,
    "class token and attention": token,
    "fused attention": fused_attention,
    "standardised weights": standardised,
    "gated": gated,
    "module called twice": twice,
    "complex values": by_fourier_transform,
    "detached": lambda op, x: x * x.detach().sigmoid() + x.detach(),
    "detached only": lambda op, x: x + x.detach().square(),
    "masked attention": masked_attention,
    "infinite padding": lambda op, x: functional.max_pool2d(functional.pad(x.exp(), (1, 1, 1, 1), value=-torch.inf), 3, 1),
    "expanded infinities": lambda op, x: x + x.sin().sum(1, True).masked_fill(x[:, :1] < 0, -torch.inf).expand_as(x).exp(),
    "into unused memory": into_unused_memory,
    "parameters like activations": parameters_like_activations,
    "selected pixels": elu_of_selected_pixels,
    "routed tokens": routed_tokens,
    "changed in a part": normalised_behind(lambda y: [y[:, :2].mul_(2.0), y][1]),
    "squashed in a part": normalised_behind(lambda y: [y[:, 0].sigmoid_(), y][1]),
    "changed before its normalisation": normalised_behind(lambda y: y.mul_(2.0)),
    "changed behind an alias": normalised_behind(lambda y: [y.view_as(y), y.mul_(2.0)][0]),
    "overwritten": lambda op, x: op.norm(op.conv(x).fill_(3.0)) + x,
    "overwritten behind an alias": lambda op, x: x * normalised_behind(lambda y: [y.view_as(y), y.fill_(3.0)][0])(op, x),
    "overwritten by a parameter": lambda op, x: x + op.conv(x).copy_(op.mean.view(-1, 1, 1)).tanh(),
    "chosen by the data": lambda op, x: x.exp() if float(x[0, 0, 0, 0].detach()) < 1e9 else x,
}


class Chain(nn.Module):
    """A convolution, the operation, and a linear layer."""

    def __init__(self, function: Callable[[Operation, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.operation = Operation()
        self.last = nn.Linear(CHANNELS * SIZE * SIZE, 3)
        self.function = function
        self.between: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        given = self.first(x)
        made = _Called()(self.operation, self.function, given)
        self.between = (given, made)
        return self.last(made.flatten(1))  # type: ignore[no-any-return]


class _Called(nn.Module):
    def forward(self, operation: Operation, function: Callable[[Operation, Tensor], Tensor], x: Tensor) -> Tensor:
        return function(operation, x)


def chain(name: str) -> tuple[Chain, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Chain(OPERATIONS[name]).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(CHANNELS, dtype=torch.float64)
            module.running_var = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    return model, torch.randn(3, 2, SIZE, SIZE, dtype=torch.float64), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("separate", [False, True], ids=["merged", "separate"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_bias_of_an_operation_is_what_finite_differences_leave(name: str, separate: bool) -> None:
    """b = y - J z with J z = d/dk op(k z) at k = 1; the bias-gradients of all that is inside add up to ∂f/∂y · b.

    What a network detaches counts as a constant: its values are held while z is scaled.
    """
    model, images, labels = chain(name)
    full = gradients.full_gradient(model, images, labels, separate=separate)
    assert float(full.error().max()) < 1e-9, name

    output = model(images).gather(1, labels[:, None]).sum()
    assert model.between is not None
    given, made = model.between
    slope = torch.autograd.grad(output, made)[0]
    found = full.total() - (full.input * full.images).flatten(1).sum(1)
    if "detached" in name or not separate:
        return
    ends = [full.biases[layer].flatten(1).sum(1) for layer in ("first", "last")]
    with torch.no_grad():
        step, z = 1e-5, given.clone()
        scaled = [model.function(model.operation, (1 + sign * step) * z) for sign in (1, -1)]
        bias = made - (scaled[0] - scaled[1]) / (2 * step)
    expected = (slope * bias).flatten(1).sum(1)
    torch.testing.assert_close(found - ends[0] - ends[1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        *("in place in a part", "class token and attention", "softplus", "product", "complex values"),
        *("masked attention", "into unused memory", "parameters like activations", "selected pixels"),
    ],
)
def test_full_gradients_of_any_operation_are_differentiable(name: str) -> None:
    """The derivative of the sum of all terms is that of the output: for the parameters, and for the images."""
    model, images, labels = chain(name)
    full = gradients.full_gradient(model, images, labels, differentiable=True)
    weights = [model.first.weight, model.operation.conv.weight, model.last.weight, full.images]
    ours = torch.autograd.grad(full.total().sum(), weights, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(full.output.sum(), weights, allow_unused=True)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted)


SAME: list[Callable[[Tensor], Tensor]] = [
    *(torch.Tensor.contiguous, torch.Tensor.double, lambda y: y.to(torch.float64), lambda y: y.view_as(y)),
    lambda y: functional.dropout2d(y, 0.5, training=False),
]


@pytest.mark.parametrize("same", SAME)
def test_a_normalisation_and_its_convolution_share_a_bias_whatever_returns_the_same_between_them(
    same: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's backward hook on a convolution is a view of its output."""
    monkeypatch.setitem(OPERATIONS, "same", normalised_behind(same))
    assert list(gradients.full_gradient(*chain("same")).biases) == ["first", "operation.norm", "last"]


def test_a_backward_hook_of_the_users_changes_no_map() -> None:
    model, images, labels = chain("convolution and normalisation")
    wanted = FullGrad()(model, images, labels)
    model.operation.conv.register_full_backward_hook(lambda *_: None)
    torch.testing.assert_close(FullGrad()(model, images, labels), wanted)


def test_operations_are_named_by_module_and_function() -> None:
    full = gradients.full_gradient(*chain("squeeze and excite"))
    assert list(full.biases) == ["first", "operation.conv", "sigmoid", "mul", "last"]
    full = gradients.full_gradient(*chain("module called twice"))
    assert list(full.biases) == ["first", "operation.conv", "operation.conv:2", "last"]
    assert full.nonlinear == frozenset()


def test_tokens_and_channels_last_are_planes_and_the_class_token_is_none() -> None:
    model = torchvision.models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3).double().eval()
    for value in model.parameters():
        nn.init.normal_(value, std=0.3)
    full = gradients.full_gradient(model, torch.randn(2, 3, 8, 8).double(), torch.tensor([0, 1]))
    planes = full.planes()
    ln = "encoder.layers.encoder_layer_0.ln_1"
    assert planes[ln].shape == (2, 8, 2, 2)
    torch.testing.assert_close(planes[ln][:, :, 0, 1], full.biases[ln][:, 2])  # token 0 is the class's
    whole = torch.stack([each.flatten(1).sum(1) for each in (full.input * full.images, *planes.values())]).sum(0)
    torch.testing.assert_close(whole + full.outside(), full.output)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 5, 1), nn.LayerNorm(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))  # type: ignore[no-any-return]

    full = gradients.full_gradient(Last().double().eval(), torch.randn(2, 3, 4, 6).double(), torch.tensor([0, 1]))
    assert full.biases["norm"].shape == (2, 4, 6, 5)
    assert full.planes()["norm"].shape == (2, 5, 4, 6)


class Attending(nn.Module):
    """Two heads over the 64 tokens of an image of 64 pixels, queries normalised: the weights have the size of the image."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.stem, self.patches = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 8, 8)
        self.qkv, self.norm, self.out, self.head = nn.Linear(8, 3 * 128), nn.LayerNorm(64), nn.Linear(128, 5), nn.Linear(5, 2)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(functional.silu(self.stem(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(len(x), 64, 3, 2, 64).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(self.norm(q), k, v)
        else:
            mixed = (functional.dropout((self.norm(q) @ k.mT / 8 + 1).softmax(-1), 0.0) + 0.1).tanh() @ v
        return self.head(self.out(mixed.transpose(1, 2).flatten(2)).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fused", [False, True], ids=["products", "fused"])
def test_attention_is_no_plane_of_pixels_though_it_has_the_shape_of_one(fused: bool) -> None:
    torch.manual_seed(0)
    model, images = Attending(fused).double().eval(), torch.randn(2, 3, 64, 64).double()
    full = gradients.full_gradient(model, images, torch.tensor([0, 1]))
    shapes = {name: tuple(value.shape) for name, value in full.biases.items()}
    assert shapes["scaled_dot_product_attention" if fused else "tanh"] == (2, 2, 64, 64)
    assert shapes["norm"] == (2, 2, 64, 64)
    planes = {name: tuple(plane.shape[1:]) for name, plane in full.planes().items()}
    assert planes == {
        **{"stem": (4, 64, 64), "silu": (4, 64, 64)},
        **{"patches": (8, 8, 8), "qkv": (384, 8, 8), "out": (5, 8, 8)},
    }
    assert float(full.error().max()) < 1e-12


def test_products_with_matrices_and_softmax_over_channels_of_maps_are_planes() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight, self.bias, self.head = nn.Conv2d(3, 4, 1), parameter(4, 5), parameter(5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.conv(x).permute(0, 2, 3, 1) @ self.weight + self.bias
            return self.head(mixed.softmax(-1).mean((1, 2)))  # type: ignore[no-any-return]

    full = gradients.full_gradient(Mixing().double().eval(), torch.randn(2, 3, 6, 7).double(), torch.tensor([0, 1]))
    shapes = {name: tuple(plane.shape[1:]) for name, plane in full.planes().items()}
    assert shapes == {"conv": (4, 6, 7), "add": (5, 6, 7), "softmax": (5, 6, 7)}


@pytest.mark.parametrize("name", ["swin", "swin_v2", "maxvit"])
def test_windows_are_no_planes_and_maps_between_them_are(name: str) -> None:
    """Four windows of four tokens have the shape of a map of four rows and columns."""
    model, images = family(name)
    full = gradients.full_gradient(model, images, torch.zeros(3, dtype=torch.long))
    inside = [name for name in full.biases if re.search(r"attn\.(qkv|softmax|matmul|add)|_attention", name)]
    assert inside
    assert not full.planes().keys() & inside
    if name.startswith("swin"):
        norms = {f"features.{stage}.{block}.norm{i}" for stage in (1, 3) for block in (0, 1) for i in (1, 2)}
        assert norms <= full.planes().keys()


def test_images_that_share_an_axis_with_windows_or_stand_second_are_kept_apart() -> None:
    class Windows(nn.Module):
        """Windows in front of the images (w B), tokens in front of them (N, B), and rows mixed into the batch."""

        def __init__(self, order: str) -> None:
            super().__init__()
            self.order, self.linear, self.head = order, nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            size = len(x)
            tokens = x.flatten(2)  # (B, 3, N)
            if self.order == "batch first":
                mixed = torch.tanh(self.linear(tokens.transpose(1, 2).reshape(-1, 3))).unflatten(0, (size, -1)).mean(1)
            elif self.order == "batch second":
                mixed = torch.tanh(self.linear(tokens.permute(2, 0, 1))).mean(0)
            else:
                mixed = torch.tanh(self.linear(tokens.permute(2, 0, 1).reshape(-1, 3))).unflatten(0, (-1, size)).mean(0)
            return self.head(mixed)  # type: ignore[no-any-return]

    for order in ("batch first", "batch second", "batch last"):
        torch.manual_seed(0)
        model, images = Windows(order).double().eval(), torch.randn(3, 3, 2, 3).double()
        whole = gradients.full_gradient(model, images, torch.tensor([0, 1, 1]))
        assert float(whole.error().max()) < 1e-12, order
        for i in range(3):
            alone = gradients.full_gradient(model, images[i : i + 1], torch.tensor([0, 1, 1])[i : i + 1])
            for name, values in alone.biases.items():
                torch.testing.assert_close(whole.biases[name][i].flatten().sum(), values.sum())


def test_images_coupled_by_batch_statistics_are_refused_and_one_alone_is_not() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.GELU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    images, labels = torch.randn(3, 3, 6, 6).double(), torch.tensor([0, 1, 2])
    for method in (gradients.full_gradient, FullGrad()):
        with pytest.raises(UserError, match=r"for an image depends on the others of its batch.*one image at a time"):
            method(model, images, labels)
    full = gradients.full_gradient(model, images[:1], labels[:1])
    torch.testing.assert_close(full.output, model(images[:1])[:, 0].detach())
    assert float(full.error()) < 1e-12


# --- what is around a call --------------------------------------------------------------------------------


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    return model.eval(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode], ids=lambda switch: switch.__name__)
def test_gradients_under_modes_that_record_nothing(switch: Any) -> None:
    model, images, labels = small()
    expected = gradients.full_gradient(model, images, labels), gradients.input_gradient(model, images, labels)
    with switch():
        made_inside = images + 0
        for given in (images, made_inside):
            full = gradients.full_gradient(model, given, labels)
            torch.testing.assert_close(full.biases, expected[0].biases)
            torch.testing.assert_close(gradients.input_gradient(model, given, labels), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_complete_to_their_own_rounding(dtype: torch.dtype) -> None:
    model, images, labels = small()
    with torch.autocast("cpu", dtype=dtype):
        assert not gradients.full_gradient(model, images, labels).inexact().any()
    full = gradients.full_gradient(model.to(dtype), images.to(dtype), labels)
    assert not full.inexact().any()


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_gradients_in_half_precision_are_those_of_float64(dtype: torch.dtype, autocast: bool) -> None:
    """Term by term, without a max-pool, which rounding would make choose among equal numbers."""
    model, images, labels = small()
    model[3] = nn.AvgPool2d(2)  # type: ignore[index, operator]
    precision = torch.float32 if autocast else dtype
    model, images = randomised(model).to(precision), images.to(precision)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        half = gradients.full_gradient(model, images, labels, separate=True)
    exact = gradients.full_gradient(model.double(), images.double(), labels, separate=True)
    assert list(half.biases) == list(exact.biases) == ["0", "1", "2", "5"]
    for name, values in [("input", exact.input), *exact.biases.items()]:
        found = half.input if name == "input" else half.biases[name]
        assert (found - values).norm() < 0.02 * values.norm(), name


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fast"])
def test_wrapped_models_are_looked_into(fast: bool) -> None:
    model, images, labels = small()
    model = layers.accelerate(model) if fast else model
    expected = gradients.full_gradient(model, images, labels).biases
    compiled: Any = torch.compile(model, backend="eager")
    for wrapped in (nn.DataParallel(model), compiled, nn.Sequential(compiled, nn.Identity()).eval()):
        biases = gradients.full_gradient(wrapped, images, labels).biases
        torch.testing.assert_close(list(biases.values()), list(expected.values()))


class Failing(nn.Module):
    """Calls a torch function whose evaluation number `last` raises."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last, self.calls = last, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    @layers.backward.visible
    def function(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise RuntimeError("no memory")
        return x.tanh()


@pytest.mark.parametrize(("last", "error"), [(1, "^no memory"), (2, "the bias of 2 can't be computed: no memory")])
@pytest.mark.parametrize("differentiable", [None, False, True], ids=["method", "constant", "differentiable"])
@pytest.mark.parametrize("recording", [False, True], ids=["no_grad", "grad"])
def test_no_hook_and_no_mode_survives_even_an_error(
    last: int, error: str, differentiable: bool | None, recording: bool
) -> None:
    """Raised inside a layer, or while its operation is linearised."""
    model, images, labels = small()
    model[2] = Failing(last).eval()  # type: ignore[index]
    model.train(differentiable is None)
    backends = torch.nn.attention._cur_sdpa_kernel_backends()
    with torch.set_grad_enabled(recording):
        with pytest.raises(Exception, match=error):
            if differentiable is None:
                FullGrad()(model, images, labels)
            else:
                gradients.full_gradient(model, images, labels, differentiable=differentiable)
        assert torch.is_grad_enabled() == recording
    assert torch.overrides._get_current_function_mode() is None
    assert torch.autograd.forward_ad._current_level == -1
    assert torch.nn.attention._cur_sdpa_kernel_backends() == backends
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.training == (differentiable is None) for module in model.modules())


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Unseen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)  # type: ignore[no-any-return]


def test_what_is_no_torch_function_is_refused_by_name() -> None:
    model, images, labels = small()
    model[2] = Unseen().eval()  # type: ignore[index]
    with pytest.raises(UserError, match=r"Square.*of 3, is no torch function that can be seen.*outside of autograd.Function"):
        gradients.full_gradient(model, images, labels)
    scripted = torch.jit.trace(small()[0], images)  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="is no torch function that can be seen"):
        gradients.full_gradient(nn.Sequential(scripted).eval(), images, labels)


class Mapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda image: image * image.tanh())(x)  # type: ignore[no-any-return]


def test_functions_under_vmap_are_refused_and_vmap_is_named() -> None:
    model, images, labels = small()
    model[2] = Mapped().eval()  # type: ignore[index]
    with pytest.raises(UserError, match=r"input of 3, is no torch function that can be seen.*torch.vmap and torch.func"):
        gradients.full_gradient(model, images, labels)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        for part in self.model:  # type: ignore[attr-defined]
            x = checkpoint(part, x, use_reentrant=False)
        return x


def checkpointed() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))
    return randomised(model).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 2])


@pytest.mark.parametrize("differentiable", [False, True])
def test_parts_under_checkpoint_have_the_same_full_gradients(differentiable: bool) -> None:
    """And derivatives: checkpoint counts what is saved, and biases save tensors, too."""
    model, images, labels = checkpointed()
    found = []
    for each in (model, Checkpointed(model).eval()):
        full = gradients.full_gradient(each, images, labels, differentiable=differentiable)
        values = [full.input, *full.biases.values()]
        if differentiable:
            values += torch.autograd.grad(sum(value.square().sum() for value in values), list(model.parameters()))
        found.append(values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


class NonLocal(nn.Module):
    """Attention between pixels: (B, c, h w) on its way, whose second dimension is no pixel's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v = nn.Conv2d(3, 16, 4, 4), *(nn.Conv2d(16, 16, 1) for _ in range(3))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (functional.gelu(f(x).flatten(2)) for f in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k).softmax(-1)
        tokens = (x + (v @ weights.transpose(1, 2)).view_as(x)).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(tokens).mean(1))  # type: ignore[no-any-return]


def test_channels_and_queries_of_a_flattened_map_are_no_tokens() -> None:
    """16 channels might be the tokens of 4 x 4 pixels, and 64 queries those of 8 x 8."""
    full = gradients.full_gradient(NonLocal().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64), 1)
    assert float(full.error().max()) < 1e-9
    assert {"gelu", "gelu:2", "gelu:3", "softmax", "matmul", "matmul:2"} < set(full.biases)
    assert set(full.planes()) == {"stem", "q", "k", "v", "tanh"}
    assert full.planes()["tanh"].shape == (2, 16, 8, 8)


class Mixer(nn.Module):
    """Mixes 16 tokens of 16 channels: in between, channels stand where tokens do elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mix = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = tokens + functional.gelu(self.mix(self.norm(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(torch.tanh(tokens).mean(1))  # type: ignore[no-any-return]


def test_a_transposition_takes_tokens_away_and_another_brings_them_back() -> None:
    full = gradients.full_gradient(Mixer().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64), 1)
    assert {"mix", "gelu"} < set(full.biases)
    assert set(full.planes()) == {"stem", "norm", "tanh"}


class ConvNeXtBlock(nn.Module):
    """As many channels as rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.wide, self.narrow = (
            nn.Conv2d(3, 8, 4, 4),
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
        )
        self.scale, self.head = nn.Parameter(torch.randn(8, 1, 1)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = functional.silu(self.narrow(functional.gelu(self.wide(self.norm(x.transpose(1, 2).transpose(2, 3)))))).contiguous()
        return self.head(torch.tanh(x + self.scale * y.permute(0, 3, 1, 2)).mean((2, 3)))  # type: ignore[no-any-return]


def test_maps_of_as_many_channels_as_rows_and_columns_keep_their_layout() -> None:
    """A square that is moved to the right moves all terms to the right."""
    model, images = ConvNeXtBlock().double().eval(), torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    images[0, :, 8:12, 4:8], images[1, :, 8:12, 24:28] = 1, 1
    full = gradients.full_gradient(model, images, 1)
    assert float(full.error().max()) < 1e-9
    planes = full.planes()
    assert {"norm", "wide", "gelu", "narrow", "silu", "tanh"} <= set(planes)
    for values in planes.values():
        torch.testing.assert_close(values[1], values[0].roll(values.shape[3] * 5 // 8, dims=2))


class Cropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 6, 3, padding=2), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.softplus(self.norm(self.conv(x)[..., 2:-3, 2:-3])).mean((2, 3)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A map multiplied by a function of what is left of it without its channels, or without its rows or columns."""

    def __init__(self, reduce: Callable[[Tensor], Tensor], dim: int) -> None:
        super().__init__()
        self.stem, self.head, self.reduce, self.dim = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3), reduce, dim

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        gate = self.reduce(features).tanh().unsqueeze(self.dim).exp()
        return self.head((features * gate).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("reduce", "dim", "shape"),
    [
        (lambda z: z.mean(1), 1, (1, 8, 8)),
        (lambda z: z.amax(dim=-3), 1, (1, 8, 8)),
        (lambda z: z.max(1).values, 1, (1, 8, 8)),
        (lambda z: z.sum(axis=1), 1, (1, 8, 8)),
        (lambda z: z[:, 2], 1, (1, 8, 8)),
        (lambda z: z.mean(1).mT, 1, (1, 8, 8)),
        (lambda z: z.mean(1), 3, (1, 8, 8)),
        (lambda z: z.mean(2), 2, None),
        (lambda z: z[..., 3], 3, None),
    ],
    ids=["mean", "amax", "max", "axis", "channel", "turned", "last", "columns", "rows"],
)
def test_a_map_without_channels_is_one_plane_and_rows_and_columns_are_none(
    reduce: Callable[[Tensor], Tensor], dim: int, shape: Any
) -> None:
    """Eight channels, rows and columns: shapes alone do not tell them apart, and 8 x 8 tokens would be a grid of 64."""
    full = gradients.full_gradient(Gated(reduce, dim).double().eval(), torch.randn(2, 3, 8, 8).double(), 0)
    planes = full.planes()
    assert full.error().max() < 1e-12
    for name in ("tanh", "exp"):
        assert (tuple(planes[name].shape[1:]) if name in planes else None) == shape
    if shape:  # where the bias is, that has the gate's rows and columns in this or the other order
        assert any(torch.equal(planes["tanh"][:, 0], values) for values in (full.biases["tanh"], full.biases["tanh"].mT))


def test_rows_of_a_map_are_no_grid_of_tokens() -> None:
    """As in networks that read text: 64 columns are no 8 x 8 pixels, whatever reads them."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.line, self.read = nn.Conv2d(3, 6, 3, padding=1), nn.Conv1d(6, 5, 3, padding=1), nn.GRU(5, 4)
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            words = self.read(self.line(self.stem(x).mean(2)).permute(2, 0, 1))[0].transpose(0, 1)
            return self.head(self.norm(words).mean(1))  # type: ignore[no-any-return]

    full = gradients.full_gradient(Reader().double().eval(), torch.randn(2, 3, 8, 64).double(), 0)
    assert full.error().max() < 1e-12
    assert set(full.planes()) == {"stem"}


def test_a_bias_that_is_computed_from_the_images_is_no_bias() -> None:
    class Shifting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(torch.ones(2, 2).to(x), torch.eye(2).to(x), x.flatten(1)[:, :2].square())

    full = gradients.full_gradient(Shifting().eval(), torch.randn(2, 1, 2, 2).double(), 0)
    assert full.error().max() < 1e-12


def test_a_map_whose_size_comes_from_a_crop_keeps_its_terms() -> None:
    full = gradients.full_gradient(randomised(Cropped()).eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64), 1)
    assert {"norm", "softplus"} < set(full.planes())


class Stepped(nn.Module):
    """Its slope is 1, by a straight-through estimator; its value is a whole number."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.floor() - x).detach() + 0 * x.floor()


def test_operations_without_a_slope_have_differentiable_full_gradients() -> None:
    model, images, labels = checkpointed()
    model[2] = Stepped().eval()
    full = gradients.full_gradient(model, images, labels, differentiable=True)
    assert float(full.error().max()) < 1e-12


def test_operators_that_know_no_dual_numbers_are_not_guessed() -> None:
    """Without a tangent, J z would count as 0, and the bias be the whole output."""
    deformed = torchvision.ops.DeformConv2d(3, 4, 3).double()
    moved = torch.randn(2, 18, 4, 4, dtype=torch.float64)

    class Deformed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return deformed(x, moved).mean((2, 3))  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=r"the bias of .* can't be computed: .*deform_conv2d"):
        gradients.full_gradient(Deformed().eval(), checkpointed()[1], 1)


def test_torchscript_is_refused_by_name() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))
    for call in (gradients.full_gradient, FullGrad(), GradCAM()):
        with pytest.raises(UserError, match="the model is TorchScript, which can't be looked into"):
            call(scripted.eval(), torch.randn(1, 3, 4, 4), 0)


class Returning(nn.Module):
    """Returns what a function makes of its flat input."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 4, 1), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("wrap", "returned"),
    [(lambda x: (x, x), "a tuple"), (lambda x: {"out": x}, "a dict"), (lambda x: x[0], r"a tensor \(16,\)")],
    ids=["tuple", "dictionary", "vector"],
)
@pytest.mark.parametrize(
    "call", [gradients.full_gradient, gradients.input_gradient, FullGrad(), GradCAM(), SmoothGrad(samples=2)]
)
def test_models_that_return_no_logits_are_told_what_is_wanted(call: Any, wrap: Any, returned: str) -> None:
    with pytest.raises(UserError, match=rf"returns {returned}, where logits \(B, K\) are expected: wrap it"):
        call(Returning(wrap).eval(), torch.randn(1, 3, 2, 2), torch.tensor([0]))


class Noisy(nn.Module):
    """Other noise in each evaluation: no affine map of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rrelu(x, 0.1, 0.9, training=True)


def test_a_sum_that_misses_the_output_is_a_warning() -> None:
    model, images, labels = small()
    model[2] = Noisy().eval()  # type: ignore[index]
    with pytest.warns(UserWarning, match="the full-gradients of Sequential sum up to"):
        gradients.full_gradient(model, 10 * images, labels)


class Centred(nn.Module):
    """Normalises the images that it is given in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.4)
        x /= 0.2
        return self.model(x)  # type: ignore[no-any-return]


def test_a_model_may_change_its_input_in_place() -> None:
    model, images, labels = small()
    given = images.double()
    model, centred = model.double(), Centred(model).eval()
    full = gradients.full_gradient(centred, given, labels)
    assert float(full.error().max()) < 1e-12
    assert "sub" in full.planes()
    torch.testing.assert_close(full.output, model((given - 0.4) / 0.2)[[0, 1], labels].detach())
    expected = gradients.input_gradient(model, (given - 0.4) / 0.2, labels) / 0.2
    torch.testing.assert_close(gradients.input_gradient(centred, given, labels), expected)
    methods = FullGrad(), GradCAM(layer="model.0"), SmoothGrad(samples=2), IntegratedGradients(steps=2), ReferenceFullGrad()
    for method in methods:
        for target in (None, 1):
            assert method(centred, given, target).isfinite().all()
    assert torch.equal(given, images.double())


# --- torchvision's families -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_full_gradients_are_complete_on_every_family(name: str) -> None:
    """Proposition 6 with random biases and running statistics: to 1e-9 of the output in float64, 1e-4 in float32."""
    model, images = family(name)
    full = gradients.full_gradient(model, images, torch.zeros(3, dtype=torch.long), target="top")
    assert float(full.error().max()) < 1e-9
    assert float((full.output - (full.input * images).flatten(1).sum(1)).abs().min()) > 1e-3  # the biases matter
    single = gradients.full_gradient(model.float(), images.float(), torch.zeros(3, dtype=torch.long), target="top")
    assert float(single.error().max()) < 1e-4
    for method in (FullGrad(), SmoothGrad(samples=2)):
        found = method(model, images.float())
        assert found.shape == (3, 1, *images.shape[-2:])
        assert len(found.unique()) > 99


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("inception", "vgg")])  # for their time
def test_accelerated_families_have_the_same_maps(name: str) -> None:
    """Under the same names in the same order."""
    model, images = family(name)
    stock, fast = (FullGrad().layers(each, images) for each in (model, layers.accelerate(copy.deepcopy(model))))
    assert list(stock) == list(fast)
    for layer, values in stock.items():
        torch.testing.assert_close(fast[layer], values, rtol=1e-7, atol=1e-9)  # torch's Hardsigmoid has a slope of float32(1/6)


@pytest.mark.parametrize(("name", "layer"), [("vit", "encoder.layers.encoder_layer_1.ln_1"), ("swin", "norm")])
def test_gradcam_of_a_transformer_takes_the_last_tokens_that_count(name: str, layer: str) -> None:
    model, images = family(name)
    explained = GradCAM()(model, images, 1)
    with gradients.captured(model, [layer]) as outputs:
        logits = model(images)
    slope = torch.autograd.grad(logits[:, 1].sum(), outputs[layer])[0]
    tokens, slope = (values[:, 1:] if name == "vit" else values.flatten(1, 2) for values in (outputs[layer], slope))
    side = round(tokens.shape[1] ** 0.5)
    maps = (slope.mean(1, keepdim=True) * tokens).sum(2).relu().view(3, 1, side, side)
    assert maps.any()
    torch.testing.assert_close(explained, functional.interpolate(maps, (32, 32), mode="bilinear"))
