"""Full-gradients: completeness (Propositions 5 and 6), finite differences of biases, locality; what hooks capture."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from tiny import randomised
from torch import Tensor, nn

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.models.resnet import ResNet
from gradexp.models.vgg import VGG
from gradexp.saliency import FullGrad
from gradexp.terms import Step
from gradexp.terms.targets import Targets

CLASSES = 3


def softplus() -> nn.Module:
    return nn.Softplus(beta=3)


def vgg(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    model = VGG(name="v", layers=[4, 5, "M", 6, "M"], width=1, channels=2, classes=CLASSES, dropout=0.5)
    for name, module in list(model.features.named_children()):
        if isinstance(module, nn.ReLU):
            setattr(model.features, name, activation())
    return model


def resnet(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return ResNet(name="r", blocks=[1, 1], width=4 / 64, channels=2, classes=CLASSES, activation=activation)


def torchvision_vgg() -> nn.Module:
    """torchvision's VGG with batch normalisation, narrow: in-place ReLUs, dropout, three linear layers with biases."""
    model = torchvision.models.VGG(nn.Identity(), num_classes=CLASSES, init_weights=False)  # type: ignore[no-untyped-call]
    model.features = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU(True)
    )
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    for place, size in ((0, (20, 8)), (3, (8, 7)), (6, (7, CLASSES))):
        model.classifier[place] = nn.Linear(*size)
    return model


def torchvision_resnet() -> nn.Module:
    """torchvision's ResNet: one ReLU module called twice a block, sums in-place."""
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES)
    model.conv1, model.bn1, model.maxpool = nn.Conv2d(2, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Identity()
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg,
    "vgg softplus": lambda: vgg(softplus),
    "resnet": resnet,
    "resnet softplus": lambda: resnet(softplus),
    "resnet gelu": lambda: resnet(nn.GELU),
    "torchvision vgg": torchvision_vgg,
    "torchvision resnet": torchvision_resnet,
}


def data(count: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 8, 8, dtype=torch.float64), torch.arange(count) % CLASSES


@pytest.mark.parametrize("separate", [False, True], ids=["merged", "separate"])
@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fast"])
@pytest.mark.parametrize("name", NETS)
def test_proposition_6_is_exact(name: str, fast: bool, separate: bool) -> None:
    model = randomised(NETS[name]())
    before = copy.deepcopy(model.state_dict())
    if fast:
        layers.accelerate(model)
    images, labels = data()
    full = gradients.full_gradient(model, images, labels, separate=separate)
    torch.testing.assert_close(full.output, model(images)[torch.arange(3), labels].detach())
    assert full.error().max() < 1e-10
    # An answer that leaves out any layer is not complete: no map is there for show.
    for layer, bias_gradient in full.biases.items():
        assert bias_gradient.abs().max() > 1e-12, layer
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["vgg softplus", "torchvision resnet"])
def test_full_gradients_of_a_log_probability_sum_up_to_its_linear_part(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """log p is not linear in the logits z: the sum is z_label - Σ p_k z_k, of the whole batch in one pass, with no warning."""
    model, (images, labels) = randomised(NETS[name]()), data()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    full = gradients.full_gradient(model, images, labels, target="logprob")
    assert passes == [3] and not recwarn.list
    logits = model(images).detach()
    expected = logits[torch.arange(3), labels] - (logits.softmax(1) * logits).sum(1)
    torch.testing.assert_close(full.total(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full.relative(full.total()), torch.ones_like(expected))
    assert full.error().max() < 1e-10
    torch.testing.assert_close(full.output, logits.log_softmax(1)[torch.arange(3), labels])


@pytest.mark.parametrize("make", [vgg, resnet])
def test_proposition_5_without_biases_the_input_gradient_is_all(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()  # type: ignore[union-attr]
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    images, labels = data()
    full = gradients.full_gradient(model, images, labels)
    torch.testing.assert_close((full.input * images).flatten(1).sum(1), full.output, rtol=1e-10, atol=0)
    assert all(bias_gradient.abs().max() == 0 for bias_gradient in full.biases.values())


def test_merged_maps_are_named_by_block_and_sum_up_the_separate_ones() -> None:
    model, (images, labels) = randomised(vgg()), data()
    merged = gradients.full_gradient(model, images, labels).biases
    separate = gradients.full_gradient(model, images, labels, separate=True).biases
    assert list(merged) == ["features.norm1", "features.norm2", "features.norm3", "linear"]
    assert [name for name in separate if name not in merged] == ["features.conv1", "features.conv2", "features.conv3"]
    for i in (1, 2, 3):
        both = separate[f"features.conv{i}"] + separate[f"features.norm{i}"]
        torch.testing.assert_close(merged[f"features.norm{i}"], both)
    assert merged["features.norm3"].shape == (3, 6, 4, 4)


@pytest.mark.parametrize("name", ["vgg", "vgg softplus", "resnet", "torchvision vgg"])
def test_each_bias_gradient_is_the_slope_in_its_bias(name: str) -> None:
    """Bias times derivative: the slope of the output when the effective bias of one channel is scaled."""
    model, (images, labels) = randomised(NETS[name]()), data(1)
    full = gradients.full_gradient(model, images, labels)
    modules, epsilon = dict(model.named_modules()), 1e-6
    for layer, bias_gradient in full.biases.items():
        module = modules[layer]
        if layer in full.nonlinear:
            continue  # its bias is no parameter; completeness has tested it
        before = modules.get(layer.replace("norm", "conv")) if layer.replace("norm", "conv") != layer else None
        if name == "torchvision vgg" and isinstance(module, nn.BatchNorm2d):
            before = modules["features.0"]
        bias = gradients.effective_bias(module, before)
        assert bias is not None
        for channel in range(len(bias)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    module.bias[channel] += sign * epsilon * bias[channel]  # type: ignore[index, operator]
                    ends.append(model(images)[0, labels[0]].item())
                    module.bias[channel] -= sign * epsilon * bias[channel]  # type: ignore[index, operator]
            slope = (ends[0] - ends[1]) / (2 * epsilon)
            assert bias_gradient[0, channel].sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-7), (layer, channel)


def test_a_curved_activation_is_linearised_where_it_is() -> None:
    model, (images, labels) = randomised(vgg(softplus)), data(1)
    with gradients.captured(model, ["features.norm1", "features.relu1"]) as values:
        logits = model(images.requires_grad_())
    z, y = values["features.norm1"], values["features.relu1"]
    bias = y - torch.sigmoid(3 * z) * z  # softplus' = sigmoid
    (slope,) = torch.autograd.grad(logits[0, labels[0]], y)
    found = gradients.full_gradient(model, images, labels).biases["features.relu1"]
    torch.testing.assert_close(found, (slope * bias).detach())


def test_full_gradients_are_constant_inside_a_linear_region() -> None:
    model, (images, labels) = randomised(vgg()), data()
    here = gradients.full_gradient(model, images, labels)
    near = gradients.full_gradient(model, images + 1e-9 * torch.randn_like(images), labels)
    far = gradients.full_gradient(model, images + torch.randn_like(images), labels)
    for layer, bias_gradient in here.biases.items():
        torch.testing.assert_close(near.biases[layer], bias_gradient, rtol=0, atol=0)
        assert layer == "linear" or not torch.equal(far.biases[layer], bias_gradient)


@pytest.mark.parametrize("name", ["vgg", "resnet softplus"])
def test_full_gradients_are_differentiable_once_more(name: str) -> None:
    model, (images, labels) = randomised(NETS[name]()), data(2)
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d))

    def norm() -> Tensor:
        full = gradients.full_gradient(model, images, labels, differentiable=True)
        return torch.stack([f.square().sum() for f in (full.input, *full.biases.values())]).sum()

    (exact,) = torch.autograd.grad(norm(), weight)
    ends = []
    for shift in (1e-6, -1e-6):
        with torch.no_grad():
            weight[0, 0, 1, 1] += shift
            ends.append(norm().item())
            weight[0, 0, 1, 1] -= shift
    assert exact[0, 0, 1, 1].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_train_mode_is_an_error() -> None:
    model, (images, labels) = randomised(vgg()), data()
    with pytest.raises(UserError, match=r"model.eval\(\)"):
        gradients.full_gradient(model.train(), images, labels)
    model.eval().features.norm1.train()  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"features.norm1 is in train mode: call model.eval\(\)"):
        gradients.full_gradient(model, images, labels)


def test_a_later_pass_in_train_mode_does_not_change_the_graph() -> None:
    """It changes running statistics in place, to which the graph of full-gradients refers."""
    model, (images, labels) = randomised(vgg(softplus)), data()
    found = []
    for between in (False, True):
        one = copy.deepcopy(model)
        full = gradients.full_gradient(one, images, labels, differentiable=True)
        if between:
            one.train()(images)
        loss = sum(values.square().sum() for values in full.biases.values())
        found.append(torch.autograd.grad(loss, one.features.conv1.weight)[0])  # type: ignore[union-attr]
    assert torch.equal(*found)


def test_a_hook_that_reads_a_layer_does_not_change_its_bias() -> None:
    """A layer is merged with its normalisation where nothing else on the way to the output uses it."""
    model, (images, labels) = randomised(vgg()), data()
    expected = gradients.full_gradient(model, images, labels).biases
    seen = []
    model.features.conv1.register_forward_hook(lambda *call: seen.append(call[2].norm()))  # type: ignore[union-attr]
    found = gradients.full_gradient(model, images, labels).biases
    assert seen and found.keys() == expected.keys()
    torch.testing.assert_close(found, expected)


# --- effective biases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
def test_an_effective_bias_is_what_the_block_adds(training: bool) -> None:
    """With its statistics held, convolution and normalisation are affine: their output at a zero image is the bias."""
    model, (images, _) = randomised(vgg()).train(training), data()
    conv, norm = model.features.conv1, model.features.norm1  # type: ignore[union-attr]
    features = conv(images).detach()
    bias = gradients.effective_bias(norm, conv, features if training else None)
    held = copy.deepcopy(norm).eval()
    if training:
        held.running_mean, held.running_var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
        torch.testing.assert_close(held(features), norm(features))
    torch.testing.assert_close(bias, held(conv(torch.zeros_like(images)))[0, :, 4, 4])


# --- what hooks capture -----------------------------------------------------------------------------------


def test_captured_outputs_stay_what_they_were_and_hooks_go() -> None:
    model, (images, _) = randomised(torchvision_vgg()), data()
    with gradients.captured(model, ["features.1", "features.2"]) as values:
        model(images)
    assert values["features.1"].min() < 0  # the in-place ReLU behind it left it alone
    torch.testing.assert_close(values["features.2"], values["features.1"].relu())
    assert model.features[2].inplace  # type: ignore[index, union-attr]
    assert not any(module._forward_hooks for module in model.modules())


def test_calls_of_a_shared_module_are_told_apart() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = nn.Hardtanh(-0.5, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.clip(self.clip(x) - 1)  # type: ignore[no-any-return]

    model = Shared()
    with gradients.captured(model, ["clip", "clip:1", "clip:2"]) as values:
        for x, first in ((0.75, 0.5), (0.25, 0.25)):  # counted anew in each pass
            model(torch.tensor(x))
            assert {name: value.item() for name, value in values.items()} == {"clip": -0.5, "clip:1": first, "clip:2": -0.5}


def test_squares_and_channel_sums_of_bf16_numbers_are_those_of_float32() -> None:
    """512 terms, which bf16 would round to 8 bits; float64 stays what it is."""
    values = torch.randn(2, 512, 3, 3).bfloat16()
    exact = values.double()
    functions: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda z: gradients.precise(z).square(), exact.square()),
        (gradients.channel_sum, exact.sum(1)),
        (lambda z: gradients.attention_map(z, 1), exact.abs().sum(1)),
        (gradients.attention_map, exact.square().sum(1)),
    ]
    for function, expected in functions:
        assert function(values).dtype == torch.float32
        torch.testing.assert_close(function(values).double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(function(exact), expected, rtol=1e-14, atol=1e-12)


def test_the_gradient_of_a_sum_is_converted_before_it_is_expanded() -> None:
    """Converted afterwards, it is a tensor in contiguous layout, which spoils that of what it is added to."""
    values = torch.randn(2, 5, 3, 4).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(gradients.channel_sum(values), values, torch.randn(2, 3, 4))
    assert gradient.dtype == torch.bfloat16 and gradient.stride(1) == 0
    assert (gradient + values).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_derivatives_of_a_sum(dim: int) -> None:
    values = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: gradients.precise_sum(z.sin(), dim), values)
    assert torch.autograd.gradgradcheck(lambda z: gradients.precise_sum(z.sin(), dim), values)


def test_an_output_of_zero_is_complete_and_has_no_share_elsewhere() -> None:
    """As of torchvision's transformers before training, whose last layer is 0."""
    model, images = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double(),
        torch.randn(2, 2, 4, 4).double(),
    )
    for parameter in model[3].parameters():
        nn.init.zeros_(parameter)
    assert FullGrad().completeness_error(model, images, 1).tolist() == [0, 0]
    assert FullGrad().share_without_place(model, images, 1).tolist() == [0, 0]


@pytest.mark.parametrize("fails", [False, True], ids=["complete", "error"])
@pytest.mark.parametrize("differentiable", [False, True])
def test_nothing_keeps_the_graph_alive(differentiable: bool, fails: bool) -> None:
    """A reference from a hook of autograd's graph to the graph is not found by the garbage collector."""

    class Token:
        """Lives as long as the tensor that has it."""

    model, (images, labels) = randomised(vgg()), data()
    tokens: list[weakref.ref[Token]] = []

    def mark(_: nn.Module, __: Any, output: Tensor) -> None:
        output.token = token = Token()  # type: ignore[attr-defined]
        tokens.append(weakref.ref(token))

    model.features.conv1.register_forward_hook(mark)  # type: ignore[union-attr]
    model.features.norm2.register_forward_hook(mark)  # type: ignore[union-attr]
    if fails:
        with pytest.raises(UserError, match="no class 9"):
            gradients.full_gradient(model, images, 9, differentiable=differentiable)
    else:
        gradients.full_gradient(model, images, labels, differentiable=differentiable)
    gc.collect()
    assert len(tokens) == 2 and not any(token() for token in tokens)


def test_hooks_go_when_the_forward_fails() -> None:
    model = randomised(vgg())
    with pytest.raises(UserError, match="halves"), gradients.captured(model, ["features.norm1"]):
        model(torch.zeros(1, 2, 1, 1, dtype=torch.float64))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_layer_names_the_nearest() -> None:
    with (
        pytest.raises(UserError, match=r"no layer features.norm11, did you mean features.norm1\?"),
        gradients.captured(vgg(), ["features.norm11"]),
    ):
        pass


# --- layers in a step -------------------------------------------------------------------------------------

LAYERS = ("features.norm1", "features.norm3")


def make_step(student: nn.Module, teacher: nn.Module) -> Step:
    images, labels = data()
    batch = Batch(images, labels, torch.arange(3), torch.zeros(3, dtype=torch.long))
    live = Targets(teacher, with_gradient=True, layers=LAYERS)
    return Step(batch, student, live, differentiable_input=True, student_layers=LAYERS)


@pytest.mark.parametrize("student_bn", ["batch", "running"])
@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fast"])
def test_layer_gradients_of_a_step(student_bn: str, fast: bool) -> None:
    """The gradient at a layer is the finite difference of the logits in that layer's output."""
    student, teacher = randomised(vgg()).train(), randomised(vgg())
    student.dropout = nn.Identity()
    if fast:
        layers.accelerate(student)
    step = make_step(student, teacher)
    found = step.student_layer_gradients("label", student_bn)
    assert list(found) == [gradients.INPUT, *LAYERS]
    assert step.student_input_gradient("label", student_bn) is found[gradients.INPUT]
    assert all(gradient.requires_grad for gradient in found.values())
    torch.manual_seed(1)
    direction = torch.randn_like(found[LAYERS[0]])

    def shifted(epsilon: float) -> float:
        student.train(student_bn == "batch")
        hook = student.features.norm1.register_forward_hook(lambda *call: call[2] + epsilon * direction)  # type: ignore[union-attr]
        value = student(step.images)[torch.arange(3), step.labels].sum().item()
        hook.remove()
        return float(value)

    slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert (found[LAYERS[0]] * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_a_step_captures_layers_in_one_forward_of_each_network() -> None:
    calls = []
    student, teacher = randomised(vgg()).train(), randomised(vgg())
    for model in (student, teacher):
        model.register_forward_hook(lambda module, *_: calls.append(module))
    step = make_step(student, teacher)
    pairs = [(step.student_features(layer), step.teacher_features(layer)) for layer in LAYERS]
    gradients_there = step.student_layer_gradients("label", "batch")
    for layer, (mine, theirs) in zip(LAYERS, pairs, strict=True):
        assert mine.shape == theirs.shape == step.teacher_layer_gradient(layer, "label").shape == gradients_there[layer].shape
        assert mine.requires_grad
        assert not theirs.requires_grad
    step.teacher_input_gradient("label")
    assert calls == [student, teacher]
    torch.testing.assert_close(
        step.teacher_input_gradient("label"), gradients.input_gradient(teacher, step.images, step.labels)
    )


@pytest.mark.parametrize("make", [vgg, resnet, torchvision_vgg])
def test_accelerated_layers_have_the_same_maps(make: Callable[[], nn.Module]) -> None:
    """Also under the same names: a convolution and its normalisation share one map."""
    model = randomised(make())
    channels = next(model.parameters()).shape[1]
    images = torch.randn(3, channels, 32, 32, dtype=torch.float64)
    stock, ours = (FullGrad().layers(each, images) for each in (model, layers.accelerate(copy.deepcopy(model))))
    assert list(stock) == list(ours)
    for name, values in stock.items():
        torch.testing.assert_close(ours[name], values, rtol=1e-9, atol=1e-12)
