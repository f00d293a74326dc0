"""Chapter 4's terms: full-gradient matching, attention, bias-gradients and dropout at one layer."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import tiny
import torch
import torchvision
from tiny import CLASSES, randomised
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.run import Paths, Run
from gradexp.gradients import inputs
from gradexp.models.vgg import VGG
from gradexp.terms import (
    Activations,
    Attention,
    AttentionJacobian,
    BiasDecay,
    BiasGradient,
    CrossEntropy,
    Fooling,
    FullGradient,
    GradientNorm,
    Jacobian,
    SoftTargets,
    Step,
    Term,
)
from gradexp.terms.maps import resized
from gradexp.terms.targets import Targets
from gradexp.training.distillation import Distillation
from gradexp.training.dropout import dropout_after

PLACES = ["block 1", "block 2"]


def net(seed: int, channels: tuple[Any, ...] = (4, "M", 5, 6)) -> nn.Module:
    """A small VGG in float64 whose batch normalisation has random statistics, in eval mode."""
    torch.manual_seed(seed)
    model = VGG(name="tiny", layers=channels, width=1, channels=2, classes=CLASSES, dropout=None)
    return randomised(model)


def batch(count: int = 4) -> Batch:
    return tiny.batch(count, size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(weight=-1), "weight=-1: it should be greater than or equal to 0"),
        (lambda: Activations(weight=float("nan"), reduction="mean"), "weight=nan"),
        (
            lambda: Fooling(weight=1, mask=0, target="label", student_bn="batch"),
            "mask=0: it should be greater than or equal to 1",
        ),
        (
            lambda: AttentionJacobian(
                weight=1, student_layers=["a"], teacher_layers=["b"], level=2, window=1, student_bn="batch"
            ),
            "level=2: it must be from 1 to 1",
        ),
    ],
)
def test_settings_out_of_range(make: Callable[[], Term], message: str) -> None:
    """Of terms that are used alone; gradexp.engine.build checks those of configs."""
    with pytest.raises(UserError, match=message):
        make()


def value(term: Term, student: nn.Module, teacher: nn.Module | None = None, data: Batch | None = None) -> Tensor:
    """The term as a training step computes it."""
    data = data or batch()
    term.resolve_layers(student, teacher, data.images[:1])
    live = Targets(copy.deepcopy(teacher), with_gradient=True, layers=term.teacher_layers) if teacher else None
    reads: dict[str, Any] = {"student_layers": term.student_layers, "student_biases": term.student_biases}
    return term(Step(data, student, live, differentiable_input=term.needs_input_gradient, **reads))


def full_gradient(**changes: Any) -> FullGradient:
    options = {"squared": True, "target": "label", "student_bn": "batch", "times_bias": False}
    options |= {"student_layers": PLACES, "teacher_layers": PLACES}
    return FullGradient(weight=1, **{**options, **changes})


def attention(**changes: Any) -> Attention:
    return Attention(weight=1, **{"student_layers": PLACES, "teacher_layers": PLACES, "squared": True, **changes})


def attention_jacobian(**changes: Any) -> AttentionJacobian:
    options = {"level": 2, "window": 2, "student_bn": "batch", "student_layers": PLACES, "teacher_layers": PLACES}
    return AttentionJacobian(weight=1, **{**options, **changes})


RUNNING: dict[str, Callable[[], Term]] = {
    "jacobian": lambda: Jacobian(weight=1, reduction="sum", target="label", student_bn="running"),
    "gradient_norm": lambda: GradientNorm(weight=1, reduction="sum", target="label", student_bn="running"),
    "fooling": lambda: Fooling(weight=1, mask=3, target="label", student_bn="running"),
    "full_gradient": lambda: full_gradient(student_bn="running"),
    "attention_jacobian": lambda: attention_jacobian(student_bn="running"),
}


@pytest.mark.parametrize("name", RUNNING)
def test_a_later_pass_with_batch_statistics_does_not_change_the_gradients_of_a_term(name: str) -> None:
    """It changes running statistics in place, to which the term's graph refers."""
    term, teacher, data, found = RUNNING[name](), net(1), batch(), []
    student = net(0).train()
    term.resolve_layers(student, teacher, data.images[:1])
    targets = Targets(teacher, with_gradient=True, layers=term.teacher_layers)
    for followed in (False, True):
        one = copy.deepcopy(student)
        step = Step(data, one, targets, differentiable_input=True, student_layers=term.student_layers)
        value = term(step)
        if followed:
            assert step.student_logits.isfinite().all()
        found.append(torch.autograd.grad(value, list(one.parameters()), allow_unused=True))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layer", ["1", "3"], ids=["behind a convolution", "behind an activation"])
def test_effective_biases_are_by_the_statistics_that_the_normalisation_uses(layer: str, frozen: bool) -> None:
    """Those of the batch of what it is given, or, in eval mode, the running ones, whatever the mode of the network."""
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4)]
    model = randomised(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))).train()
    norm = model[int(layer)].train(not frozen)  # type: ignore[index]
    given: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    term = bias_gradient(layer=layer, student_bn="batch")
    found = value(term, copy.deepcopy(model))
    data = batch()
    logits = model[int(layer) + 1 :](output := norm(model[: int(layer)](data.images)))  # type: ignore[index]
    (slope,) = torch.autograd.grad(logits.gather(1, data.labels[:, None]).sum(), output)
    mean, variance = norm.running_mean, norm.running_var
    if not frozen:
        mean, variance = given[-1].mean((0, 2, 3)), given[-1].var((0, 2, 3), correction=0)
    shift = mean - model[0].bias if layer == "1" else mean  # type: ignore[index]
    bias = norm.bias - norm.weight * shift / (variance + norm.eps).sqrt()
    torch.testing.assert_close(found, (bias.view(-1, 1, 1) * slope).square().sum((1, 2, 3)).mean())


# --- layers by their place --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "places"),
    [
        ("vgg9", {"block 1": "norm1", "block 2": "norm2", "block 3": "norm3", "last block": "norm7", "last": "norm8"}),
        ("vgg11", {"block 1": "norm1", "block 2": "norm3", "block 3": "norm5", "last block": "norm9", "last": "norm10"}),
        ("vgg9", {"end of block 1": "norm1", "end of block 2": "norm2", "end of block 3": "norm4"}),
        ("vgg11", {"end of block 1": "norm2", "end of block 2": "norm4", "end of block 3": "norm6"}),
    ],
)
def test_blocks_of_the_thesis_networks(model: str, places: dict[str, str]) -> None:
    """§4.7: the layers that are matched have 64, 128 and 256 channels."""
    config = compose_run(["experiment=teacher", f"model={model}", "scale=paper"])
    network, image = build(config["model"], where="model"), torch.zeros(1, 3, 32, 32)
    found = {place: gradients.find_layer(network, place, image) for place in places}
    assert {place: layer.name for place, layer in found.items()} == {p: f"features.{n}" for p, n in places.items()}
    assert all(layer.before == layer.name.replace("norm", "conv") for layer in found.values())
    channels = [network.get_submodule(layer.name).num_features for layer in list(found.values())[:3]]
    assert channels == [64, 128, 256]
    assert network.training


def test_blocks_of_a_resnet_are_its_stages() -> None:
    config = compose_run(["experiment=teacher", "model=resnet18", "scale.width=0.05"])
    network = build(config["model"], where="model")
    names = [gradients.find_layer(network, f"block {i}", torch.zeros(1, 3, 32, 32)).name for i in (1, 2, 4)]
    assert names == ["norm", "stages.1.0.norm1", "stages.3.0.norm1"]


def test_activations_follow_their_layer() -> None:
    """The module that takes the layer's output, whatever its name; in a residual block, too."""
    image = torch.zeros(1, 3, 32, 32)
    vgg = build(compose_run(["experiment=teacher", "model=vgg11", "scale.width=0.05"])["model"], where="model")
    resnet = build(compose_run(["experiment=teacher", "model=resnet18", "scale.width=0.05"])["model"], where="model")
    places = ["block 1 activation", "block 3 activation", "last activation"]
    assert [gradients.find_layer(vgg, place, image).name for place in [*places, "end of block 3 activation"]] == [
        *("features.relu1", "features.relu5", "features.relu10", "features.relu6")
    ]
    assert [gradients.find_layer(resnet, place, image).name for place in places[:2]] == ["act", "stages.2.0.act1"]
    assert gradients.find_layer(vgg, "features.norm3 activation", image) == ("features.relu3", None)
    with pytest.raises(UserError, match=r"no module follows stages\.3\.1\.norm2 of ResNet"):
        gradients.find_layer(resnet, "last activation", image)


def test_the_call_that_follows_a_layer_is_meant_of_an_activation_that_is_shared() -> None:
    """Blocks of torchvision's ResNets call one ReLU twice: behind the first normalisation, and behind the sum."""
    model, images = torchvision.models.resnet18().eval(), torch.randn(1, 3, 32, 32)
    places = [gradients.find_layer(model, rule, images).name for rule in ("block 2", "block 2 activation")]
    assert places == ["layer1.0.bn1", "layer1.0.relu:1"]
    with torch.no_grad(), gradients.captured(model, places) as values:
        model(images)
    assert torch.equal(values[places[0]].relu(), values[places[1]])
    with (
        pytest.raises(UserError, match=r"layer1\.0\.relu is called several times"),
        dropout_after(model, {"layer": "block 2 activation", "probability": 0.5}, images),
    ):
        pass


def test_a_reused_tensor_id_names_no_wrong_activation() -> None:
    """Without normalisation the input of a pool is freed, and its memory and id are reused by later outputs."""
    layers = [nn.Conv2d(3, 4, 3, padding=1)]
    for _ in range(6):
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1)]
    model, image = nn.Sequential(*layers, nn.ReLU()), torch.zeros(1, 3, 64, 64)
    for block in range(1, 7):
        name = str(3 * (block - 1))
        assert gradients.find_layer(model, f"block {block}", image) == (name, None)
        assert gradients.find_layer(model, f"block {block} activation", image) == (str(3 * block - 2), None)


def test_attention_of_chapter_4_sums_absolute_values_after_normalisation() -> None:
    config = compose_run(["experiment=fullgrad_distill", "method=fg_att", "scale.width=0.05"])
    student, teacher = build(config["model"], where="model"), build(config["model"], where="model")
    term = build(config["method"]["terms"]["attention"], where="method.terms.attention")
    term.resolve_layers(student, teacher, torch.zeros(1, 3, 32, 32))
    assert term.student_layers == ("features.norm1", "features.norm3", "features.norm5")
    assert [wanted.kind for wanted in term.teacher_maps] == ["absolute"] * 3
    squares = build({**config["method"]["terms"]["attention"], "power": None}, where="method.terms.attention")
    assert [wanted.kind for wanted in squares.teacher_maps] == ["attention"] * 3


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    model, image = net(0), batch(1).images
    assert gradients.find_layer(model, "linear", image) == ("linear", None)
    assert gradients.find_layer(model, "features.norm3", image) == ("features.norm3", "features.conv3")
    with pytest.raises(UserError, match="no layer 'block 3 activation': it has 2 blocks"):
        gradients.find_layer(model, "block 3 activation", image)
    for rule in ("block 3", "end of block 3"):
        with pytest.raises(UserError, match=f"no layer '{rule}': it has 2 blocks"):
            gradients.find_layer(model, rule, image)
    with pytest.raises(UserError, match=r"`last block`.*did you mean features.norm3"):
        gradients.find_layer(model, "features.norm33", image)


# --- matching maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [full_gradient, attention])
@pytest.mark.parametrize("squared", [True, False])
def test_terms_vanish_for_a_student_that_is_its_teacher(make: Callable[..., Term], squared: bool) -> None:
    student = net(0)
    found = value(make(squared=squared), student, net(0))
    assert found.item() == pytest.approx(0, abs=1e-12)
    gradient = torch.autograd.grad(found, student.features.conv1.weight)[0]  # type: ignore[union-attr]
    assert gradient.abs().max() < 1e-12  # not NaN, where the distance has a corner


def test_the_full_gradient_term_does_not_depend_on_the_scale_of_gradients() -> None:
    teacher, expected = net(1), value(full_gradient(), net(0), net(1))
    assert expected > 0.01
    for side in (0, 1):
        pair = [net(0), copy.deepcopy(teacher)]
        with torch.no_grad():
            pair[side].linear.weight *= 37  # type: ignore[operator, union-attr]
        torch.testing.assert_close(value(full_gradient(), *pair), expected)


def test_the_attention_term_does_not_depend_on_the_scale_of_features() -> None:
    expected = value(attention(), net(0), net(1))
    assert expected > 0.01
    pair = [net(0), net(1)]
    with torch.no_grad():
        pair[1].features.norm2.weight *= 5  # type: ignore[operator, union-attr]
        pair[1].features.norm2.bias *= 5  # type: ignore[operator, union-attr]
    torch.testing.assert_close(value(attention(), *pair), expected)


# Values from definitions alone: neither the project's code nor torch's modules compute them.


class Noise(NamedTuple):
    """Noise that multiplies the bias of one layer: `explicit`, beta, or `effective`; values (B, c, 1, 1) or (B, c, h, w)."""

    layer: str
    bias: str
    values: Tensor


class Plain(NamedTuple):
    """Logits, and of each normalised convolution: its output, its bias beta, and its effective bias, (c, 1, 1)."""

    logits: Tensor
    outputs: dict[str, Tensor]
    explicit: dict[str, Tensor]
    effective: dict[str, Tensor]


def plainly(model: Any, images: Tensor, noise: Noise | None = None) -> Plain:
    """A tiny VGG from its parameters; in train mode with differentiable statistics of these images."""
    values, outputs, explicit, effective = images, {}, {}, {}
    for kind, module in model.features.named_children():
        if isinstance(module, nn.Conv2d):
            conv, values = module, functional.conv2d(values, module.weight, padding=1)
        elif isinstance(module, nn.BatchNorm2d):
            name, mean, variance = f"features.{kind}", module.running_mean - conv.bias, module.running_var
            if module.training:
                mean = values.mean((0, 2, 3))
                variance = (values - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
            scale = module.weight / (variance + module.eps).sqrt()
            explicit[name] = module.bias.view(-1, 1, 1)
            effective[name] = added = explicit[name] - (scale * mean).view(-1, 1, 1)
            if noise and noise.layer == name:
                noisy = {"explicit": explicit, "effective": effective}[noise.bias][name]
                added = added - noisy + noisy * noise.values
            outputs[name] = values = scale.view(-1, 1, 1) * values + added
        else:
            values = functional.max_pool2d(values, 2) if kind.startswith("pool") else values.clamp(min=0)
    return Plain(values.mean((2, 3)) @ model.linear.weight.T + model.linear.bias, outputs, explicit, effective)


def slopes(plain: Plain, labels: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the labels' logits; with batch statistics, of their sum over the batch."""
    own = [logits[label] for logits, label in zip(plain.logits, labels, strict=True)]
    return torch.autograd.grad(torch.stack(own).sum(), wanted)


def by_hand(student: nn.Module, teacher: nn.Module, kind: str, squared: bool, power: int = 0) -> float:
    """Eqs. 2.8 and 4.3. kind: attention | gradient | times_bias."""
    data, total, maps = batch(), 0.0, []
    for model in (student, teacher):
        plain = plainly(model, data.images)
        if kind == "attention":
            each = list(plain.outputs.values())[:2]
            maps.append([sum(abs(channel) ** power for channel in values.unbind(1)) for values in each])
            continue
        each = list(slopes(plain, data.labels, list(plain.outputs.values())[:2]))
        if kind == "times_bias":
            each = [bias * slope for bias, slope in zip(plain.effective.values(), each, strict=False)]
        maps.append([sum(values.unbind(1)) for values in each])
    for mine, theirs in zip(*maps, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            distance = torch.linalg.vector_norm(one / one.norm() - other / other.norm())
            total += distance.item() ** (2 if squared else 1) / len(data.images)
    return total


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("squared", [True, False])
def test_matched_maps_against_their_equations(squared: bool, training: bool) -> None:
    student, teacher = net(0).train(training), net(1, (7, "M", 3))
    terms: dict[tuple[str, int], Term] = {
        ("gradient", 0): full_gradient(squared=squared),
        ("times_bias", 0): full_gradient(squared=squared, times_bias=True),
        ("attention", 1): attention(squared=squared, power=1),
        ("attention", 2): attention(squared=squared, power=2),
    }
    found = {kind: value(term, copy.deepcopy(student), teacher).item() for kind, term in terms.items()}
    expected = {(kind, power): by_hand(student, teacher, kind, squared, power) for kind, power in terms}
    assert found == pytest.approx(expected, rel=1e-10)
    assert len({round(number, 6) for number in found.values()}) == len(found)  # no two of them are one thing
    assert value(attention(squared=squared), copy.deepcopy(student), teacher).item() == found["attention", 2]


def test_running_statistics_give_a_student_in_train_mode_its_eval_values() -> None:
    student, teacher = net(0), net(1)
    for kind, times_bias in (("gradient", False), ("times_bias", True)):
        expected = by_hand(student.eval(), teacher, kind, True)
        found = value(full_gradient(student_bn="running", times_bias=times_bias), student.train(), teacher)
        assert found.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_input_gradients_of_a_student_in_train_mode(training: bool) -> None:
    """Gradients of the sum over the batch, through its statistics, as in the author's code."""
    student, teacher, data = net(0).train(training), net(1), batch()
    images = data.images.clone().requires_grad_()
    mine, theirs = (slopes(plainly(model, images), data.labels, [images])[0] for model in (student, teacher))
    step = Step(data, student, Targets(teacher, with_gradient=True), differentiable_input=True)
    found = Jacobian(weight=1, reduction="sum", target="label", student_bn="batch")(step)
    assert found.item() == pytest.approx(sum((mine[i] - theirs[i]).square().sum().item() for i in range(4)) / 4, rel=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_attention_jacobian_of_a_student_in_train_mode(training: bool) -> None:
    """Eq. 2.9 at the teacher's largest pooled pixel; the gradient is through the statistics of the whole batch."""
    student, teacher, data, maps = net(0).train(training), net(1, (7, "M", 3)), batch(), []
    images = data.images.clone().requires_grad_()
    for model in (student, teacher):
        squares = plainly(model, images).outputs["features.norm2"].square().sum(1)
        maps.append(squares.unfold(1, 2, 1).unfold(2, 2, 1).mean((3, 4)).flatten(1))
    largest = maps[1].argmax(1)
    assert not (largest == maps[0].argmax(1)).all()
    mine, theirs = (torch.autograd.grad(each[torch.arange(4), largest].sum(), images)[0] for each in maps)
    distances = [(one / one.norm() - other / other.norm()).square().sum() for one, other in zip(mine, theirs, strict=True)]
    found = value(attention_jacobian(), student, teacher, data)
    assert found.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-10)


def test_an_unknown_power_is_an_error() -> None:
    with pytest.raises(UserError, match=r"power=3: it must be 1 \(absolute values\) or 2 \(squares\)"):
        attention(power=3)


def test_resizing_leaves_equal_sizes_untouched() -> None:
    maps = torch.randn(2, 4, 4)
    assert resized(maps, (4, 4)) is maps
    expected = functional.interpolate(maps[:, None], size=(8, 8), mode="bilinear")[:, 0]
    torch.testing.assert_close(resized(maps, (8, 8)), expected)


def test_the_smaller_map_is_resized_to_the_larger() -> None:
    """Student at 8 pixels, teacher at 4: as if the teacher's map had been enlarged by hand."""
    student, teacher, data = net(0), net(1), batch()
    term = full_gradient(student_layers=["block 1"], teacher_layers=["block 2"])
    found = value(term, student, teacher)
    maps = []
    for model, layer in ((student, "features.norm1"), (teacher, "features.norm2")):
        with gradients.captured(model, [layer]) as outputs:
            logits = model(data.images)
        (gradient,) = torch.autograd.grad(gradients.scalar(logits, data.labels, "label").sum(), outputs[layer])
        maps.append(gradient.sum(1))
    maps[1] = functional.interpolate(maps[1][:, None], scale_factor=2, mode="bilinear")[:, 0]
    cosine = functional.cosine_similarity(maps[0].flatten(1), maps[1].flatten(1), dim=1)
    torch.testing.assert_close(found, (2 - 2 * cosine).mean())


def test_maps_that_cannot_be_matched_are_errors() -> None:
    with pytest.raises(UserError, match=r"8x8 positions, the teacher's features.norm2 4x4: choose"):
        value(attention(student_layers=["block 1"], teacher_layers=["block 2"]), net(0), net(1))
    with pytest.raises(UserError, match="linear is no map"):
        value(full_gradient(student_layers=["linear"], teacher_layers=["block 2"]), net(0), net(1))
    with pytest.raises(UserError, match="matched in pairs"):
        attention(student_layers=["block 1"])


class Wide(nn.Module):
    """Maps of 4 rows and 16 columns, which no map of 8x8 fits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images.reshape(len(images), 2, 4, 16)).mean((2, 3))


def test_maps_without_common_sizes_are_errors() -> None:
    with pytest.raises(UserError, match="the teacher's conv 4x16: choose student_layers"):
        value(full_gradient(student_layers=["block 1"], teacher_layers=["block 1"]), net(0), Wide().eval())


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "fast"])
@pytest.mark.parametrize("student_bn", ["batch", "running"])
@pytest.mark.parametrize("name", ["full_gradient", "times_bias", "bias_gradient", "attention_jacobian", "fooling"])
def test_parameter_gradients_through_double_backward(name: str, student_bn: str, fast: bool) -> None:
    """Against finite differences along a random direction of all parameters, through batch statistics too."""
    terms: dict[str, Callable[[], Term]] = {
        "full_gradient": lambda: full_gradient(student_bn=student_bn),
        "times_bias": lambda: full_gradient(student_bn=student_bn, times_bias=True),
        "bias_gradient": lambda: bias_gradient(layer="block 2", student_bn=student_bn),
        "attention_jacobian": lambda: attention_jacobian(student_bn=student_bn),
        "fooling": lambda: Fooling(weight=1, mask=3, target="label", student_bn=student_bn),
    }
    student, teacher = net(0).train(), net(1)
    if fast:
        layers.accelerate(student)
    parameters = list(student.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def loss(epsilon: float) -> Tensor:
        moved = copy.deepcopy(student)
        with torch.no_grad():
            for parameter, direction in zip(moved.parameters(), directions, strict=True):
                parameter += epsilon * direction
        return value(terms[name](), moved, teacher)

    found = torch.autograd.grad(value(terms[name](), student, teacher), parameters, allow_unused=True)
    exact = sum((g * d).sum().item() for g, d in zip(found, directions, strict=True) if g is not None)
    slope = (loss(1e-6) - loss(-1e-6)).item() / 2e-6
    assert exact == pytest.approx(slope, rel=1e-5, abs=1e-8)


# --- mixed precision --------------------------------------------------------------------------------------


def step_in(dtype: torch.dtype) -> Any:
    """What terms read of a step, as bf16 numbers in `dtype`; images and parameters are in float32, as under autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(64))
    nn.init.normal_(model[0].bias)
    logits, maps, features, gradient, layer_gradient = (
        [torch.randn(4, *shape).bfloat16().to(dtype) for _ in range(2)]
        for shape in ((99,), (8, 8), (64, 8, 8), (3, 8, 8), (64, 8, 8))
    )
    return SimpleNamespace(
        labels=torch.arange(4),
        images=gradients.precise(gradient[0]),
        student=model,
        student_logits=logits[0],
        teacher_logits=logits[1],
        student_features=lambda *_: features[0],
        teacher_features=lambda *_: features[1],
        student_input_gradient=lambda *_: gradient[0],
        teacher_input_gradient=lambda *_: gradient[1],
        student_feature_gradient=lambda *_: gradient[0],
        teacher_feature_gradient=lambda *_: gradient[1],
        student_layer_gradients=lambda *_: {"0": layer_gradient[0]},
        teacher_map=lambda *_: maps[1],
    )


PAIR: dict[str, Any] = {"student_layers": ["0"], "teacher_layers": ["0"]}
READS: dict[str, Callable[[], Term]] = {
    "cross_entropy": lambda: CrossEntropy(weight=1),
    "activations": lambda: Activations(weight=1, reduction="sum"),
    "soft_targets": lambda: SoftTargets(weight=1, temperature=2),
    "gradient_norm": lambda: GradientNorm(weight=1, reduction="sum", target="label", student_bn="batch"),
    "jacobian": lambda: Jacobian(weight=1, reduction="sum", target="label", student_bn="batch"),
    "unsquared jacobian": lambda: Jacobian(weight=1, reduction="norm", target="label", student_bn="batch"),
    "attention_jacobian": lambda: attention_jacobian(level=1, **PAIR),
    "fooling": lambda: Fooling(weight=1, mask=3, target="label", student_bn="batch"),
    "full_gradient": lambda: full_gradient(**PAIR),
    "attention": lambda: attention(power=2, **PAIR),
    "absolute attention": lambda: attention(power=1, **PAIR),
    "bias_gradient": lambda: bias_gradient(layer="0", bias="explicit", noise="channel"),
    "bias_gradient by position": lambda: bias_gradient(layer="0", bias="explicit", noise="position"),
}


@pytest.mark.parametrize("name", READS)
def test_terms_of_bf16_numbers_are_computed_in_float32(name: str) -> None:
    """A loss that is rounded to 8 bits has lost what training changes."""
    half, exact = READS[name]()(step_in(torch.bfloat16)), READS[name]()(step_in(torch.float64))
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=1e-5)


# --- Proposition 10 and dropout ---------------------------------------------------------------------------


def bias_gradient(**changes: str) -> BiasGradient:
    options = {"layer": "block 2", "bias": "effective", "noise": "position", "target": "label", "reduction": "sum"}
    return BiasGradient(weight=1, **{"student_bn": "running", **options, **changes})


def noisy_outputs(model: nn.Module, data: Batch, layer: str, change: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The label's logit with a layer's output changed, `count` times for each image. (count, B)."""
    hook = model.get_submodule(layer).register_forward_hook(lambda *call: change(call[2]))
    with torch.no_grad():
        logits = model(data.images.repeat(count, 1, 1, 1))
    hook.remove()
    return gradients.scalar(logits, data.labels.repeat(count), "label").view(count, -1)


@pytest.mark.parametrize("bias", ["explicit", "effective"])
@pytest.mark.parametrize("noise", ["position", "channel"])
def test_proposition_10(noise: str, bias: str) -> None:
    """E (y - f(b xi))^2 = (y - f)^2 + sigma^2 ||b df/db||^2, xi ~ N(1, sigma^2); exact for piecewise-linear nets."""
    model, data, sigma, count = net(0), batch(2), 1e-4, 2000
    penalty = value(bias_gradient(noise=noise, bias=bias), model, data=data).item()
    truth = torch.randn(2, dtype=torch.float64)
    size = (2 * count, 5, 4, 4) if noise == "position" else (2 * count, 5, 1, 1)
    draws = sigma * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def losses(xi: Tensor) -> Tensor:
        images, labels = data.images.repeat(len(xi) // 2, 1, 1, 1), data.labels.repeat(len(xi) // 2)
        logits = plainly(model, images, Noise("features.norm2", bias, xi)).logits
        return (truth - gradients.scalar(logits, labels, "label").view(-1, 2)).square().mean(1)

    clean = losses(torch.ones(2, 1, 1, 1)).item()
    noisy = (losses(1 + draws) + losses(1 - draws)) / 2
    error = noisy.std().item() / count**0.5
    assert error < 0.05 * sigma**2 * penalty  # the interval is narrow enough to refute a wrong constant
    assert abs(noisy.mean().item() - clean - sigma**2 * penalty) < 4 * error


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("bias", ["explicit", "effective", "none"])
@pytest.mark.parametrize("noise", ["position", "channel"])
def test_the_penalty_on_bias_gradients_against_its_definition(noise: str, bias: str, training: bool) -> None:
    model, data = net(0).train(training), batch()
    plain = plainly(model, data.images)
    (slope,) = slopes(plain, data.labels, [plain.outputs["features.norm2"]])
    if noise == "channel":
        slope = slope.sum((2, 3), keepdim=True)
    factor = 1 if bias == "none" else getattr(plain, bias)["features.norm2"]
    expected = (factor * slope).square().sum().item() / 4
    found = value(bias_gradient(noise=noise, bias=bias, student_bn="batch"), model, data=data)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_the_penalty_of_table_4_3_is_a_weight_decay_of_beta() -> None:
    """Of strength 100 g^2, with g = df/dbeta, which makes 100 comparable with the weight decay of .1."""
    node = compose_run(["experiment=bias_gradient"])["method"]["terms"]["bias_gradient"]
    model, data = net(0, (4, "M", 5)), batch()
    term = build({**node, "student_bn": "running"}, where="method.terms.bias_gradient")
    beta = model.get_parameter("features.norm2.bias")
    (pull,) = torch.autograd.grad(term.weight * value(term, model, data=data), beta)
    plain = plainly(model, data.images)
    (slope,) = slopes(plain, data.labels, [plain.outputs["features.norm2"]])
    strength = 100 * slope.sum((2, 3)).square().mean(0)
    decay = BiasDecay(weight=1, layer="last block", bias="explicit", student_bn="running")
    (expected,) = torch.autograd.grad(value(decay, model, data=data), beta)
    torch.testing.assert_close(pull, strength * expected)


@pytest.mark.parametrize(("noise", "entries"), [("position", 5 * 4 * 4), ("channel", 5)])
def test_the_mean_over_a_layer_is_the_sum_divided_by_the_number_of_entries(noise: str, entries: int) -> None:
    total, mean = (value(bias_gradient(noise=noise, reduction=kind), net(0)).item() for kind in ("sum", "mean"))
    assert total > 0
    assert mean == pytest.approx(total / entries, rel=1e-12)


def test_a_bias_of_zero_is_moved_by_cross_entropy_and_not_by_its_penalty() -> None:
    """beta is 0 when training starts; the effective bias is not."""
    model = net(0)
    with torch.no_grad():
        model.features.norm2.bias.zero_()  # type: ignore[operator, union-attr]
    parameters = list(model.parameters())
    for kind, flat in (("explicit", True), ("effective", False), ("none", False)):
        found = torch.autograd.grad(value(bias_gradient(bias=kind), model), parameters, allow_unused=True)
        assert all(g is None or not g.any() for g in found) == flat
    (moved,) = torch.autograd.grad(value(CrossEntropy(weight=1), model), model.get_parameter("features.norm2.bias"))
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["explicit", "effective"])
def test_channel_noise_scales_the_bias_of_a_channel(kind: str) -> None:
    """b df/db by moving the parameter, with b the parameter itself or the effective bias."""
    model, data = net(0), batch(1)
    bias = model.features.norm2.bias.detach().clone()  # type: ignore[operator, union-attr]
    if kind == "effective":
        bias = gradients.layer_bias(model, gradients.Layer("features.norm2", "features.conv2")).detach()
    slopes = []
    for channel in range(5):
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.features.norm2.bias[channel] += sign * 1e-6 * bias[channel]  # type: ignore[operator, union-attr]
            ends.append(moved(data.images)[0, data.labels[0]].item())
        slopes.append((ends[0] - ends[1]) / 2e-6)
    found = value(bias_gradient(noise="channel", bias=kind), model, data=data).item()
    assert found == pytest.approx(sum(slope**2 for slope in slopes), rel=1e-5)


def squared_sensitivity(model: nn.Module, data: Batch, layer: str) -> Tensor:
    """||z df/dz||^2 of Eq. 4.1, (B,)."""
    with gradients.captured(model, [layer]) as outputs:
        logits = model(data.images)
    (slope,) = torch.autograd.grad(gradients.scalar(logits, data.labels, "label").sum(), outputs[layer])
    return (outputs[layer] * slope).square().flatten(1).sum(1).detach()


def test_dropout_in_the_limit_of_low_noise() -> None:
    """Eq. 4.1, multiplicative Gaussian noise on the activations of an early layer."""
    model, data, sigma, count = net(0), batch(2), 1e-4, 2000
    limit = squared_sensitivity(model, data, "features.relu1").mean().item()
    clean = gradients.scalar(model(data.images), data.labels, "label").detach()

    def outputs(sign: int) -> Tensor:
        torch.manual_seed(3)
        return noisy_outputs(model, data, "features.relu1", lambda z: z * (1 + sign * sigma * torch.randn_like(z)), count)

    losses = torch.stack([(clean - outputs(sign)).square() for sign in (1, -1)]).mean(0).mean(1)
    error = losses.std().item() / count**0.5
    assert error < 0.05 * sigma**2 * limit
    assert abs(losses.mean().item() - sigma**2 * limit) < 4 * error


def test_dropout_after_is_equation_4_1() -> None:
    """The network is linear in these activations, so the equation holds for any noise: p = 0.5."""
    model, data, count, p = net(0), batch(2), 4000, 0.5
    sigma2 = p / (1 - p)  # variance of a mask that is 0 or 1 / (1 - p)
    expected = sigma2 * squared_sensitivity(model, data, "features.relu3").mean().item()
    clean = gradients.scalar(model(data.images), data.labels, "label").detach()
    model.features.norm3.train()  # type: ignore[union-attr]
    model.features.norm3.momentum = 0.0  # type: ignore[union-attr]
    normalise = model.features.norm3  # type: ignore[union-attr]
    normalise.forward = lambda x: functional.batch_norm(  # type: ignore[method-assign, union-attr]
        x,
        normalise.running_mean,
        normalise.running_var,
        normalise.weight,
        normalise.bias,
        eps=normalise.eps,  # type: ignore[arg-type, union-attr]
    )
    with dropout_after(model, {"layer": "last", "probability": p}, data.images[:1]):
        model.features.norm3.training = True  # type: ignore[union-attr]
        outputs = noisy_outputs(model, data, "features.relu3", lambda output: output, count)
    losses = (clean - outputs).square().mean(1)
    error = losses.std().item() / count**0.5
    assert error < 0.05 * expected
    assert abs(losses.mean().item() - expected) < 4 * error
    assert not model.features.norm3._forward_hooks  # type: ignore[union-attr]


def test_dropout_after_has_no_effect_in_eval_mode_and_checks_its_probability() -> None:
    model, data = net(0), batch()
    expected = model(data.images)
    with dropout_after(model, {"layer": "last block", "probability": 0.5}, data.images[:1]):
        assert torch.equal(model(data.images), expected)
        assert not torch.equal(model.train()(data.images), expected)
    with (
        pytest.raises(UserError, match=r"method.dropout.probability=1"),
        dropout_after(model, {"layer": "last", "probability": 1}, data.images[:1]),
    ):
        pass


def test_bias_decay_is_the_squared_norm_of_the_bias() -> None:
    model = net(0)
    norm, conv = model.features.norm2, model.features.conv2  # type: ignore[union-attr]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator, union-attr]
    effective = norm.bias - scale * (norm.running_mean - conv.bias)  # type: ignore[operator, union-attr]
    for kind, bias in (("explicit", norm.bias), ("effective", effective)):
        found = value(BiasDecay(weight=1, layer="block 2", bias=kind, student_bn="running"), model)
        torch.testing.assert_close(found, bias.square().sum())  # type: ignore[operator, union-attr]


def test_a_layer_without_bias_is_an_error() -> None:
    model = net(0)
    model.features.norm2, model.features.conv2.bias = nn.Identity(), None  # type: ignore[union-attr]
    for term in (bias_gradient(), bias_gradient(bias="explicit"), full_gradient(times_bias=True)):
        with pytest.raises(UserError, match=r"features.conv2 has no bias"):
            value(term, model, net(1))


# --- a step, a run ----------------------------------------------------------------------------------------


def test_a_step_of_fg_att_takes_one_forward_and_one_gradient_of_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose_run(["experiment=fullgrad_distill", "method=fg_att"])["method"]["terms"]
    terms: list[Term] = [build(node, where=f"method.terms.{name}") for name, node in config.items()]
    student, teacher, data = net(0, (4, "M", 5, "M", 6)).train(), net(1, (4, "M", 5, "M", 6)), batch()
    for term in terms:
        term.resolve_layers(student, teacher, data.images[:1])
    names = {"student": student, "teacher": teacher}
    calls: list[str] = []
    for name, model in names.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    taken = inputs._gradients
    monkeypatch.setattr(inputs, "_gradients", lambda *call, **options: calls.append("gradient") or taken(*call, **options))
    assert terms[3].student_layers == ("features.norm1", "features.norm2", "features.norm3") == terms[3].teacher_layers
    assert terms[4].student_layers == ("features.norm1", "features.norm2", "features.norm3") == terms[4].teacher_layers
    layers_read = terms[3].student_layers + terms[4].student_layers
    live = Targets(teacher, with_gradient=True, layers=layers_read)
    step = Step(data, student, live, differentiable_input=True, student_layers=layers_read)
    torch.stack([term(step) for term in terms]).sum().backward()  # type: ignore[no-untyped-call]
    assert step.angle() is not None
    assert sorted(calls) == ["gradient", "gradient", "student", "teacher"]


TINY = ["scale=quick", "scale.width=0.05", "optim.passes=3", "trainer.threads=1", "trainer.precision=32", "logger=none"]


def run(experiment: str, places: list[str], *words: str) -> Run:
    teacher = ["+upstream.teacher.optim.passes=1", "+upstream.teacher.scale.width=0.05"] if "full" in experiment else []
    config = compose_run([f"experiment={experiment}", *TINY, *teacher, *words, *places])
    return Run(config, Paths.of(config))


def test_stored_and_live_targets_train_the_same_student(places: list[str]) -> None:
    places = [*places, "data.per_class=2", "data.crop=0", "optim.passes=4"]
    kept = ensure(run("fullgrad_distill", places, "method=fg_att"))
    outputs = Path(places[1].partition("=")[2])
    (folder,) = (found for found in (outputs / "cache" / "targets").iterdir() if found.is_dir())
    names = {file.name for file in folder.iterdir() if not file.name.endswith(".crc")}
    assert {"logits", "gradient-label"} < names
    assert {f"absolute-features.norm{i}" for i in (1, 2, 3)} < names
    assert {f"gradient-features.norm{i}-label" for i in (1, 2, 3)} < names
    live = ensure(run("fullgrad_distill", [f"{place}-live" if "paths" in place else place for place in places],
                      "method=fg_att", "trainer.store_gib=0"))  # fmt: skip
    assert live["id"] == kept["id"]
    assert (kept["targets"], live["targets"]) == ("stored", "live")
    for name, curve in kept["metrics"].items():
        if isinstance(curve, list):  # their last passes differ by what Adam makes of bf16's rounding
            assert curve[:2] == pytest.approx(live["metrics"][name][:2], rel=2e-2), name
    assert kept["metrics"]["angle"] == kept["metrics"]["train/angle"][-1]


def test_the_angle_is_between_gradients_of_the_labels_logits() -> None:
    """Figure 4.1 where no term matches gradients: the student in train mode, the teacher in eval mode; a mean over images."""
    student, teacher, data = net(0).train(), net(1), batch()
    copies, optim = [copy.deepcopy(student), copy.deepcopy(teacher)], SimpleNamespace(total_steps=lambda _: 1)
    live = Targets(teacher, with_gradient=True)
    options: dict[str, Any] = {"steps_per_pass": 1, "seed": 0, "targets": live, "angle": "label"}
    module = Distillation(student, {"cross_entropy": CrossEntropy(weight=1)}, optim, **options)
    step = Step(data, student, live, differentiable_input=module.needs_input_gradient)
    module.terms["cross_entropy"](step)
    found = module.observe(step)["train/angle"]
    images = data.images.clone().requires_grad_()
    slopes = [torch.autograd.grad(each(images)[range(4), data.labels].sum(), images)[0].flatten(1) for each in copies]
    angles = [torch.acos(mine @ its / mine.norm() / its.norm()).rad2deg() for mine, its in zip(*slopes, strict=True)]
    torch.testing.assert_close(found, torch.stack(angles).mean())


@pytest.mark.parametrize("method", ["ce_a_10", "att"])
def test_the_angle_is_recorded_where_no_term_matches_gradients(places: list[str], method: str) -> None:
    words = [f"method={method}", "data.per_class=3", "optim.batch_size=16"]
    record = ensure(run("fullgrad_distill", places, *words))
    assert len(record["metrics"]["train/angle"]) == 3
    assert all(30 < angle < 120 for angle in record["metrics"]["train/angle"])
    without = ensure(run("fullgrad_distill", places, *words, "method.angle=null"))
    assert "train/angle" not in without["metrics"]
    for name, curve in without["metrics"].items():
        assert curve == record["metrics"][name], name  # looking changes nothing


@pytest.mark.parametrize("method", ["none", "dropout", "bias_decay", "bias_gradient"])
def test_regularisers_train(places: list[str], method: str) -> None:
    record = ensure(run("bias_gradient", places, f"method={method}", "data.per_class=2", "optim.passes=2"))
    assert record["status"] == "finished"
    assert (f"train/loss/{method}" in record["metrics"]) == method.startswith("bias")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bias_gradient", "method.terms.bias_gradient.layer=block 9"], "no layer 'block 9': it has 5 blocks"),
        (["bias_gradient", "method=dropout", "method.dropout.layer=norm"], "no layer 'norm'"),
        (["bias_gradient", "method.terms.bias_gradient.layer=linear"], "the output of linear is no map"),
        (["fullgrad_distill", "method.terms.attention.student_layers=[block 2,block 1,block 3]"], "positions"),
    ],
)
def test_wrong_layers_are_errors(places: list[str], words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ensure(run(words[0], places, *words[1:], "data.per_class=2"))


def test_a_method_that_matches_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="method fg_att needs a teacher"):
        compose_run(["experiment=bias_gradient", "method=fg_att"])
    with pytest.raises(UserError, match=r"it needs a judge, .*\+upstream\.judge\.experiment="):
        compose_run(["experiment=gan_test", "upstream.judge=null"])
    with pytest.raises(UserError, match=r"terms\.fooling\.mask takes its value from 'task\.mask'"):
        compose_run(["experiment=score_matching", "method=fooling"])


def holding(teacher: nn.Module) -> nn.Module:
    return nn.ModuleDict({"teacher": teacher})


def test_a_teacher_computes_in_eval_mode_whoever_trains_around_it() -> None:
    teacher, data = net(1), batch()
    wanted = Targets(copy.deepcopy(teacher), with_gradient=False).logits(data)
    targets, statistics = Targets(teacher, with_gradient=False), copy.deepcopy(dict(teacher.named_buffers()))
    holding(teacher).train()
    torch.testing.assert_close(targets.logits(data), wanted)
    assert all(torch.equal(value, statistics[name]) for name, value in teacher.named_buffers())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = (nn.Conv2d(2, CLASSES, 3).double() for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        self.other(images)
        return self.first(images).mean((2, 3))


def step_with(**options: Any) -> Step:
    return Step(batch(), net(0), **options)


LAYER = "features.norm2"
PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    "a network as teacher": (lambda: step_with(teacher=net(1)), r"teacher=Targets\(model, with_gradient=True\)"),
    "no input-gradient, one logit": (
        lambda: GradientNorm(weight=1, reduction="sum", target="label", student_bn="running")(step_with()),
        r"Step\(\.\.\., differentiable_input=True\)",
    ),
    "no input-gradient, all logits": (
        lambda: GradientNorm(weight=1, reduction="sum", target="all", student_bn="running")(step_with()),
        r"Step\(\.\.\., differentiable_input=True\)",
    ),
    "no input-gradient beside layers": (
        lambda: step_with(student_layers=[LAYER]).student_input_gradient("label", "running"),
        r"Step\(\.\.\., differentiable_input=True\)",
    ),
    "no input-gradient, one pixel": (
        lambda: attention_jacobian(student_layers=[LAYER], teacher_layers=[LAYER], level=1)(
            step_with(student_layers=[LAYER], teacher=Targets(net(1), with_gradient=True, layers=[LAYER]))
        ),
        r"Step\(\.\.\., differentiable_input=True\)",
    ),
    "no layer of the step": (
        lambda: step_with().student_features(LAYER),
        r"features.norm2 is none of the layers .*Step\(\.\.\., student_layers=\['features.norm2'\]\)",
    ),
    "no layer of the targets": (
        lambda: Targets(net(1), with_gradient=True).features(batch(), LAYER),
        r"features.norm2 is none of the layers .*Targets\(\.\.\., layers=\['features.norm2'\]\)",
    ),
    "no layer of the gradients": (
        lambda: Targets(net(1), with_gradient=True).layer_gradient(batch(), LAYER, "label"),
        r"features.norm2 is none of the layers .*Targets\(\.\.\., layers=\['features.norm2'\]\)",
    ),
    "neither layers nor an input-gradient": (
        lambda: step_with().student_layer_gradients("label", "running"),
        r"Step\(\.\.\., differentiable_input=True\)",
    ),
    "a layer of another head": (
        lambda: Targets(TwoHeads(), with_gradient=True, layers=["other"]).layer_gradient(batch(), "other", "label"),
        "the teacher's output does not depend on layer other",
    ),
    "targets without gradients": (
        lambda: Targets(net(1), with_gradient=False).input_gradient(batch(), "all"),
        r"make them with Targets\(\.\.\., with_gradient=True\)",
    ),
}


@pytest.mark.parametrize("name", PYTHON)
def test_what_a_step_in_python_lacks_is_named(name: str) -> None:
    call, message = PYTHON[name]
    with pytest.raises(UserError, match=message):
        call()
