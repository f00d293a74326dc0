"""Saliency methods: the thesis's examples by hand, completeness, sanity, and an independent FullGrad."""

import copy
import itertools
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny import randomised
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.layers import convolution, dense, ranks, winograd
from gradexp.models.resnet import ResNet
from gradexp.models.vgg import VGG
from gradexp.saliency import (
    FullGrad,
    GradCAM,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    Random,
    ReferenceFullGrad,
    ReferenceGradCAM,
    ReferenceSimpleFullGrad,
    ReferenceSmoothFullGrad,
    Saliency,
    SimpleFullGrad,
    SmoothFullGrad,
    SmoothGrad,
    SmoothGradSquared,
)
from gradexp.saliency.method import value_range
from gradexp.saliency.psi import psi
from gradexp.tasks.saliency_score import completeness

PSI = ["abs", "rescale", "upsample"]
METHODS: dict[str, Saliency] = {
    "random": Random(),
    "input_gradient": InputGradient(channels="abs"),
    "gradient_times_input": GradientTimesInput(channels="sum"),
    "integrated_gradients": IntegratedGradients(steps=5, channels="abs"),
    "smoothgrad": SmoothGrad(samples=3, sigma=0.15, channels="abs"),
    "smoothgrad_squared": SmoothGradSquared(samples=3, sigma=0.15, channels="sum"),
    "gradcam": GradCAM(),
    "gradcam_reference": ReferenceGradCAM(),
    "fullgrad": FullGrad(psi=PSI, separate=False),
    "fullgrad_eq32": FullGrad(psi=["abs", "rescale_channels", "upsample"], separate=False),
    "fullgrad_reference": ReferenceFullGrad(),
    "simple_fullgrad_reference": ReferenceSimpleFullGrad(),
    "smooth_fullgrad_reference": ReferenceSmoothFullGrad(samples=2),
    "fullgrad_separate": FullGrad(psi=["abs", "rescale_channels", "upsample"], separate=True),
    "fullgrad_signed": FullGrad(psi=["upsample"], separate=False),
    "simple_fullgrad": SimpleFullGrad(psi=PSI, separate=False),
    "smooth_fullgrad": SmoothFullGrad(psi=PSI, separate=False, samples=2, sigma=0.15),
}
DETERMINISTIC = [name for name in METHODS if name != "random" and "smooth" not in name]


def net(**changes: Any) -> VGG:
    """A small VGG in float64 and eval mode, with random statistics, scales and biases in batch normalisation."""
    options = {"name": "t", "layers": [6, "M", 8, 8, "M"], "width": 1, "channels": 3, "classes": 4, "dropout": 0.5}
    model = VGG(**{**options, **changes}).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.5)
    return model


def pictures(count: int = 3, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=torch.float64)


class Plane(nn.Module):
    """A function of two numbers, given as a picture of one row."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        first, second = images.flatten(1).unbind(1)
        return self.function(first, second)[:, None]


def point(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


# --- every method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_the_output_does_not_need_are_left_out(name: str) -> None:
    """An auxiliary head that eval mode does not call, as Inception's, and tokens that no logit reads."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.uncalled, self.unread = net(), nn.Conv2d(3, 4, 3).double(), nn.Conv2d(3, 4, 3).double()

        def forward(self, images: Tensor) -> Tensor:
            self.unread(images)
            logits: Tensor = self.body(images)
            return logits

    model, images = Heads(), pictures()
    torch.manual_seed(1)
    maps = METHODS[name](model, images, 1)
    torch.manual_seed(1)
    torch.testing.assert_close(maps, METHODS[name](model.body, images, 1))


def test_grad_cam_of_a_layer_that_the_output_does_not_need_is_refused() -> None:
    model = net()
    model.aside = nn.Conv2d(3, 4, 3)  # not called
    with pytest.raises(UserError, match="aside: the output does not depend on it"):
        GradCAM(layer="aside")(model, pictures())


def test_everything_works_under_inference_mode() -> None:
    model, images = net(), pictures()
    labels = model(images).argmax(1)
    with torch.inference_mode():
        inside = model(images.clone()).argmax(1)
        for method in (FullGrad(), GradCAM(), ReferenceFullGrad(), InputGradient()):
            torch.testing.assert_close(method(model, images.clone(), inside), method(model, images, labels))
        for target in (inside, 2):
            assert FullGrad().layers(model, images, target).keys() == FullGrad().layers(model, images).keys()
            assert FullGrad().completeness_error(model, images, target).max() < 1e-9
            assert FullGrad().share_without_place(model, images, target).isfinite().all()
        gradient = gradients.input_gradient(model, images.clone(), inside)
    torch.testing.assert_close(gradient, gradients.input_gradient(model, images, labels))


def test_a_module_called_input_has_a_map_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).double()
    named = nn.Sequential()
    for name, module in zip(("input", "relu", "pool", "flat", "linear"), model, strict=True):
        named.add_module(name, module)
    images = pictures()
    assert list(FullGrad().layers(named, images)) == ["input", "input:2"]
    torch.testing.assert_close(FullGrad()(named, images, 1), FullGrad()(model, images, 1))
    reference = ReferenceFullGrad()
    torch.testing.assert_close(reference(named, images, 1), reference(model, images, 1))


@pytest.mark.parametrize("prepare", [layers.accelerate, ranks.share_layers])
def test_replaced_layers_have_the_maps_of_the_stock_ones(prepare: Callable[[nn.Module], nn.Module]) -> None:
    """Map by map: sums stay right where one operation becomes several."""
    body = [nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    stock = randomised(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))).double().eval()
    images = 4 * pictures()
    expected, found = (FullGrad().layers(model, images, 1) for model in (stock, prepare(deepcopy(stock))))
    assert list(found) == list(expected) == ["input", "0", "1", "3"]
    for name, maps in expected.items():
        torch.testing.assert_close(found[name], maps)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", [None, 2, torch.tensor([0, 3, 1])], ids=["predicted", "one", "each"])
def test_a_map_has_the_images_size_and_the_model_stays_as_it_was(name: str, target: Tensor | int | None) -> None:
    model = net().train()
    nn.init.uniform_(model.linear.weight, 0.1, 1)  # the positive part that Grad-CAM takes must not be empty
    model.features.norm1.eval()  # a module in another mode than the model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():  # whatever the caller has switched off
        maps = METHODS[name](model, pictures(), target)
    assert maps.shape == (3, 1, 8, 8)
    assert not maps.requires_grad
    assert maps.std() > 0
    assert model.training
    assert not model.features.norm1.training
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["fullgrad", "input_gradient", "integrated_gradients"])
def test_the_classes_of_a_target_are_counted_in_the_pass_that_explains_it(name: str) -> None:
    model, calls = net(), list[int]()
    model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    METHODS[name](model, pictures(), 2)
    assert len(calls) == 1


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_none_means_the_predicted_class(name: str) -> None:
    model, images = net(), pictures(5)
    torch.testing.assert_close(METHODS[name](model, images), METHODS[name](model, images, model(images).argmax(1)))


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_models_weights_cost_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maps are the same, and no convolution is asked for a gradient of its weights."""
    masks: list[list[bool]] = []
    kernel = convolution._kernel
    monkeypatch.setattr(convolution, "_kernel", lambda *given: masks.append(given[-1]) or kernel(*given))
    model, images = layers.accelerate(net()), pictures()
    maps, asked = [], []
    for trained in (True, False):
        masks.clear()
        model.requires_grad_(trained)
        torch.manual_seed(0)
        maps.append(METHODS[name](model, images))
        asked.append(any(wants_w or wants_b for _, wants_w, wants_b in masks))
    torch.testing.assert_close(maps[0], maps[1], rtol=0, atol=0)
    assert asked == [name in ("integrated_gradients", "smoothgrad", "smoothgrad_squared"), False]  # Captum's gradients


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_maps_of_an_accelerated_network_are_those_of_the_stock_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, on channels_last images, with both convolutions of our own, against float64; noise is the same in both."""
    chosen, faster = set[Any](), convolution._faster
    monkeypatch.setattr(convolution, "_faster", lambda *given: [module := faster(*given), chosen.add(module)][0])
    monkeypatch.setattr(torch, "randn_like", lambda values: torch.randn(values.shape).to(values))
    monkeypatch.setattr(torch, "normal", lambda mean, std: mean + std * torch.randn(std.shape).to(std))
    fast = net(layers=[64, "M", 128, "M", 128]).float().requires_grad_(False)
    nn.init.uniform_(fast.linear.weight, 0.1, 1)  # the positive part that Grad-CAM takes must not be empty
    stock = copy.deepcopy(fast).double()
    layers.accelerate(fast.to(memory_format=torch.channels_last))
    images, maps = pictures(64).float().contiguous(memory_format=torch.channels_last), []
    for model, given in ((fast, images), (stock, images.double().contiguous())):
        torch.manual_seed(1)
        maps.append(METHODS[name](model, given).flatten(1).double())
    errors = (maps[0] - maps[1]).norm(dim=1) / maps[1].norm(dim=1)
    assert chosen >= {dense, winograd}
    assert errors.quantile(0.9) < 1e-5
    assert errors.max() < 0.1  # in some image, rounding may switch a ReLU


@pytest.mark.parametrize("name", METHODS)
def test_maps_do_not_depend_on_what_surrounds_the_call(name: str) -> None:
    """no_grad, inference_mode with images made inside it, wrappers of the model."""
    model, images = net(), pictures()

    def explain(explained: nn.Module, given: Tensor) -> Tensor:
        torch.manual_seed(0)
        return METHODS[name](explained, given)

    expected = explain(model, images)
    with torch.no_grad():
        torch.testing.assert_close(explain(model, images), expected)
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, images + 0), expected)
    torch.testing.assert_close(explain(nn.DataParallel(model), images), expected)


@pytest.mark.parametrize("name", ["fullgrad", "gradcam", "smoothgrad"])
def test_compiled_models_are_explained_and_keep_nothing(name: str) -> None:
    """By torch.compile, and in place."""
    model, images = net(), pictures()

    def explain(explained: Any) -> Tensor:
        torch.manual_seed(0)
        return METHODS[name](explained, images, 2)

    expected, logits = explain(model), model(images)
    torch.testing.assert_close(explain(torch.compile(model, backend="eager")), expected)
    model.compile(backend="eager")
    torch.testing.assert_close(explain(model), expected)
    assert not model._forward_hooks and not model._forward_pre_hooks
    model.linear = nn.Linear(model.linear.in_features, 2).double()  # fewer classes than the target that was explained
    assert model(images).shape == (3, 2) != logits.shape


@pytest.mark.parametrize("method", [FullGrad(), SmoothGrad(samples=4)], ids=["fullgrad", "smoothgrad"])
def test_maps_under_autocast_are_nearly_those_in_full_precision(method: Saliency) -> None:
    torch.manual_seed(0)
    model, images, maps = net().float(), pictures(size=16).float(), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            maps.append(method(model, images, 2).flatten().float())
    assert not torch.equal(*maps)
    assert torch.corrcoef(torch.stack(maps))[0, 1] > 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_models_in_half_precision_are_explained(name: str, dtype: torch.dtype) -> None:
    maps = METHODS[name](net().to(dtype), pictures().to(dtype))
    assert maps.shape == (len(pictures()), 1, *pictures().shape[-2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_maps_in_half_precision_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    """Of a smooth network: rounding would switch ReLUs, and choose among equal numbers in a max-pool."""
    model, images = net(layers=[6, 8, 8], activation=nn.Softplus), pictures().to(dtype)
    nn.init.uniform_(model.linear.weight, 0.1, 1)  # the positive part that Grad-CAM takes must not be empty
    half = METHODS[name](model.to(dtype), images, 2).flatten(1).double()
    exact = METHODS[name](model.double(), images.double(), 2).flatten(1)
    assert (half - exact).norm() < 0.05 * exact.norm()
    for one, other in zip(half, exact, strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.99


def test_the_usual_defaults() -> None:
    assert FullGrad() == FullGrad(psi=("abs", "rescale", "upsample"), separate=False)
    assert SmoothGrad() == SmoothGrad(samples=50, sigma=0.15, channels="abs")
    assert IntegratedGradients() == IntegratedGradients(steps=50, channels="abs")
    for method in (
        SimpleFullGrad(),
        SmoothFullGrad(samples=2),
        InputGradient(),
        GradientTimesInput(),
        SmoothGradSquared(samples=2),
    ):
        assert method(net(), pictures()).isfinite().all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_image_is_explained_alone(name: str) -> None:
    model, images = net(), pictures()
    torch.testing.assert_close(METHODS[name](model, images)[1:2], METHODS[name](model, images[1:2]))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_another_model_gives_another_map(name: str) -> None:
    images = pictures()
    assert not torch.allclose(METHODS[name](net(), images, 0), METHODS[name](net(), images, 0), rtol=0.01)


MISTAKES = {
    "target": (lambda: METHODS["fullgrad"](net(), pictures(), 4), "classes 0 to 3"),
    "targets of another number": (lambda: METHODS["input_gradient"](net(), pictures(), torch.tensor([0, 1])), "one per image"),
    "layer without a map": (lambda: GradCAM(layer="linear")(net(), pictures()), "its output is no map"),
    "negative target": (lambda: METHODS["input_gradient"](net(), pictures(), torch.tensor([0, -1, 2])), "no class -1"),
    "grey image": (lambda: METHODS["gradcam"](net(), pictures()[:, :1]), "the model takes 3"),
    "no batch": (lambda: METHODS["gradcam"](net(), pictures()[0]), r"takes \(B, C, H, W\)"),
    "too small": (lambda: METHODS["smoothgrad"](net(), pictures(size=1)), "at least 4 pixels"),
    "no features": (
        lambda: GradCAM()(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2)),
        "spatial",
    ),
    "no map so large": (lambda: GradCAM(smallest=9)(net(), pictures()), "9 rows and columns or more; its largest map is 8x8"),
    "units": (lambda: SmoothGrad(samples=1, sigma=0.1, channels="abs", units="pixels")(net(), pictures()), "normalised, raw"),
    "layer": (lambda: GradCAM(layer="features.conv9")(net(), pictures()), "features.conv3"),
    "nan": (lambda: METHODS["fullgrad"](net(), pictures() * torch.nan), "the model returns NaN; look at"),
    "weight that a ReLU hides": (lambda: FullGrad()(*hidden_nan()), "the model returns NaN; look at"),
    "samples": (lambda: SmoothGrad(samples=0), "samples=0: it should be greater than or equal to 1"),
    "sigma": (lambda: SmoothFullGrad(sigma=-0.1), "sigma=-0.1: it should be greater than or equal to 0"),
    "steps": (lambda: IntegratedGradients(steps=2.5), "steps=2.5: it should be a valid integer"),  # type: ignore[arg-type]
    "deviations": (lambda: InputGradient(std=[0.2, 0.3]), "std="),  # type: ignore[arg-type]
    "deviations of no channels": (
        lambda: InputGradient(std=torch.ones(3)),
        r"std has shape \(3,\); give a number, or \(C, 1, 1\)",
    ),
    "black of no channels": (lambda: IntegratedGradients(black=torch.zeros(3)), r"black has shape \(3,\); give a number, or"),
    "no network": (lambda: FullGrad()(lambda images: images, pictures()), r"the model is a function; give a network"),  # type: ignore[arg-type]
    "detached, one gradient": (lambda: METHODS["input_gradient"](Detached(), pictures()), "does not depend on the images"),
    "detached, many gradients": (lambda: METHODS["smoothgrad"](Detached(), pictures()), "does not depend on the images"),
    "psi": (lambda: FullGrad(psi=["rescale", "abs", "upsample"], separate=False), r"\[abs, rescale, upsample\]"),
    "channels": (lambda: InputGradient(channels="max")(net(), pictures()), "abs, sum, square, std"),
}


class Detached(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.detach().mean((2, 3))


def hidden_nan() -> tuple[nn.Module, Tensor]:
    """The NaN is multiplied by 0 in the forward pass, and masked by the ReLU in the backward pass."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].bias[0] = -100
        model[3].weight[0, 0] = torch.nan
    return model, torch.rand(1, 1, 2, 2)


class Coloured(nn.Module):
    """Makes three channels of the one it is given, and its first module is not the one that sees the images."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary, self.net = nn.Conv2d(8, 2, 1), net()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.repeat(1, 3, 1, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_network_may_convert_its_images(name: str) -> None:
    assert METHODS[name](Coloured(), pictures()[:, :1], 1).isfinite().all()


class Merging(nn.Linear):
    """Puts its weights together in eval mode, and takes them apart in train mode, as layers of LoRA do."""

    merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if self.merged == mode:
            self.weight.data.mul_(0.5 if mode else 2)
            self.merged = not mode
        return self


def test_modules_that_work_in_train_are_told_of_it_afterwards() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), Merging(216, 4)).train()
    model[0].eval()
    before = model[2].weight.clone()
    FullGrad()(model, torch.randn(2, 3, 8, 8))
    assert (model[2].merged, model[2].training, model[0].training) == (False, True, False)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    call, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        call()  # type: ignore[no-untyped-call]


# --- Integrated gradients and SmoothGrad ------------------------------------------------------------------


@pytest.mark.parametrize(("at", "expected"), [((4, 4), (10, 6)), ((1.5, 1.5), (2.5, 3.5)), ((2, 2), (4, 4))])
def test_example_1_integrated_gradients_are_counter_intuitive(at: tuple[float, float], expected: tuple[float, float]) -> None:
    model = Plane(lambda x, y: torch.where((x <= 1) & (y <= 1), x + 3 * y, 3 * x + y))
    ig = IntegratedGradients(steps=400, channels="sum")(model, point(*at))
    torch.testing.assert_close(ig.flatten(), torch.tensor(expected, dtype=torch.float64), atol=0.05, rtol=0)
    gradient = InputGradient(channels="sum")(model, point(*at))
    assert gradient.flatten().tolist() == [3, 1]  # weak dependence: the same at all three points


def test_integrated_gradients_are_complete_from_a_black_image() -> None:
    model, images = net(), pictures()
    black = torch.tensor([-1.0, -0.5, 0.2], dtype=torch.float64).view(3, 1, 1)
    ig = IntegratedGradients(steps=300, channels="sum", black=black)(model, images, 1)
    difference = model(images)[:, 1] - model(black.expand_as(images))[:, 1]
    torch.testing.assert_close(ig.sum((1, 2, 3)), difference, atol=2e-3, rtol=0)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    model, images = net(), pictures()
    images[1] *= 7  # every image has a range of its own
    for channels in ("sum", "abs"):
        smooth = SmoothGrad(samples=4, sigma=0, channels=channels)(model, images)
        torch.testing.assert_close(smooth, InputGradient(channels=channels)(model, images))
    squared = SmoothGradSquared(samples=4, sigma=0, channels="sum")(model, images)
    torch.testing.assert_close(squared, InputGradient(channels="square")(model, images))


def test_smoothgrads_noise_is_a_part_of_each_images_range() -> None:
    """For f = x₁³/3 the mean gradient is x₁² + σ², the mean squared one x₁⁴ + 6 x₁² σ² + 3 σ⁴."""
    model = Plane(lambda x, _: x**3 / 3)
    images = torch.cat([point(1, 0), point(4, -6)])
    sigmas = torch.tensor([0.5 * 1, 0.5 * 10], dtype=torch.float64)
    firsts = images[:, 0, 0, 0]
    mean = SmoothGrad(samples=4000, sigma=0.5, channels="sum")(model, images)[:, 0, 0, 0]
    torch.testing.assert_close(mean, firsts**2 + sigmas**2, rtol=0.1, atol=0)
    squared = SmoothGradSquared(samples=4000, sigma=0.5, channels="sum")(model, images)[:, 0, 0, 0]
    torch.testing.assert_close(squared, firsts**4 + 6 * firsts**2 * sigmas**2 + 3 * sigmas**4, rtol=0.2, atol=0)


@pytest.mark.parametrize("units", ["normalised", "raw"])
def test_the_range_is_of_the_normalised_image_or_of_its_pixels(units: str) -> None:
    """A cube of the first channel: the mean gradient is x² + σ², σ half of what the range is in the units of that channel."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(2, 1, 1) for values in ((0.5, 0.1), (0.25, 0.5)))
    pixels = torch.rand(3, 2, 2, 2, dtype=torch.float64) * torch.tensor([1.0, 0.3, 0.6]).view(3, 1, 1, 1)
    images = (pixels - mean) / std
    values, unit = (images, 1.0) if units == "normalised" else (pixels, 0.25)
    expected = torch.stack([(one.max() - one.min()) / unit for one in values])
    method = SmoothGrad(samples=4000, sigma=0.5, channels="sum", units=units, black=-mean / std, std=std)
    torch.testing.assert_close(value_range(images, units, method)[:, 0, 0, 0], expected)

    class Cube(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, 0, None] ** 3 / 3

    found = method(Cube(), images)[:, 0, 0, 0]
    torch.testing.assert_close(found, images[:, 0, 0, 0] ** 2 + (expected / 2) ** 2, rtol=0.12, atol=0)
    one = SmoothGrad(samples=1, sigma=0, channels="sum")
    torch.testing.assert_close(value_range(pixels, "raw", one), value_range(pixels, "normalised", one).expand(3, 2, 1, 1))


def cam(features: Tensor, head: Callable[[Tensor], Tensor], label: int) -> Tensor:
    """Grad-CAM of feature maps with the rest of the network, not upsampled."""
    features = features.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(head(features)[:, label].sum(), features)
    return (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()


def test_gradcam_by_hand() -> None:
    """Behind the last convolution's normalisation and activation; where that map is too small, at an earlier convolution."""
    model, images = net(), pictures()
    nn.init.normal_(model.linear.weight)
    places = list(model.features._modules)
    assert places[7:10] == ["conv3", "norm3", "relu3"]
    for method, end in (
        (GradCAM(), 10),
        (GradCAM(smallest=4), 10),
        (GradCAM(smallest=5), 3),
        (GradCAM(layer="features.conv3"), 8),
    ):
        small = cam(model.features[:end](images), lambda z, end=end: model.linear(model.features[end:](z).mean((2, 3))), 2)
        assert small.any()
        expected = functional.interpolate(small, size=(8, 8), mode="bilinear")
        torch.testing.assert_close(method(model, images, 2), expected)


def test_gradcam_takes_the_call_behind_the_convolution_of_an_activation_that_is_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.hidden, self.head = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 4)

        def features(self, images: Tensor) -> Tensor:
            return self.act(self.conv(images))  # type: ignore[no-any-return]

        def rest(self, maps: Tensor) -> Tensor:
            return self.head(self.act(self.hidden(maps.mean((2, 3)))))  # type: ignore[no-any-return]

        def forward(self, images: Tensor) -> Tensor:
            return self.rest(self.features(images))

    model, images = Shared().double(), pictures()
    expected = functional.interpolate(cam(model.features(images), model.rest, 2), size=(8, 8), mode="bilinear")
    torch.testing.assert_close(GradCAM()(model, images, 2), expected)


def test_the_last_map_of_any_network() -> None:
    model = ResNet(name="t", blocks=[1, 1], width=0.1, channels=3, classes=4, activation=nn.ReLU).double().eval()
    assert gradients.last_features(model, pictures(), 1) == "stages.1.0.act2"  # behind the sum with the shortcut
    assert gradients.last_features(model, pictures(), 5) == "stages.0.0.act2"
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()).double().eval()
    assert gradients.last_features(bare, pictures(), 1) == "3"
    assert gradients.last_features(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).double(), pictures(), 1) == "0"
    scaled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten()).double()
    assert gradients.last_features(scaled, pictures(), 1) == "2"
    assert gradients.last_features(scaled[:2], pictures(), 1) == "1"


@pytest.mark.parametrize("scale", ["cpu", "quick"])
def test_the_maps_of_gradcam_are_as_large_as_the_captions_of_chapter_3_say(scale: str) -> None:
    config = compose_run(["experiment=pixel_perturbation", f"scale={scale}"])["upstream"]["model"]
    model = build({**config["model"], "width": 0.1}, where="model").eval()
    images = torch.rand(2, 3, config["data"]["size"], config["data"]["size"])
    for smallest, size in ((1, 2), (4, 4)):
        name = gradients.last_features(model, images, smallest)
        with gradients.captured(model, [name]) as outputs, torch.no_grad():
            model(images)
        assert isinstance(model.get_submodule(name), nn.ReLU)
        assert outputs[name].shape[2:] == (size, size)


# --- FullGrad ---------------------------------------------------------------------------------------------


def rescaled(maps: Tensor) -> Tensor:
    """Each image's (C, h, w) to [0, 1]; a constant one to 0."""
    return torch.stack([(one - one.min()) / max(float(one.max() - one.min()), 1e-300) for one in maps])


def slow_fullgrad(model: VGG, images: Tensor, target: int, *, by_channel: bool) -> Tensor:
    """Eq. 3.2 layer by layer and channel by channel, from the definition: f^b = bias times slope, by autograd of the bias.

    A block's bias is what conv and batch normalisation add at input 0 far from the border. ψ rescales each channel, as
    Eq. 3.2 has it, or first the layer at once, as the author's code does.
    """
    total = torch.zeros_like(images[:, :1])
    inputs = images.clone().requires_grad_()
    model(inputs)[:, target].sum().backward()
    terms = [inputs.grad * images]  # type: ignore[operator]
    for number in (1, 2, 3):
        conv, norm = (getattr(model.features, f"{kind}{number}") for kind in ("conv", "norm"))
        zeros = torch.zeros(1, conv.in_channels, 3, 3, dtype=torch.float64)
        bias = norm(conv(zeros))[0, :, 1, 1].detach()
        added: list[Tensor] = []

        def add(_: nn.Module, __: Any, output: Tensor, added: list[Tensor] = added) -> Tensor:
            added.append(torch.zeros_like(output).requires_grad_())
            return output + added[0]

        handle = norm.register_forward_hook(add)
        value = model(images)[:, target].sum()
        handle.remove()
        (slope,) = torch.autograd.grad(value, added[0])
        terms.append(slope * bias.view(1, -1, 1, 1))
    for term in terms:
        whole = term.abs() if by_channel else rescaled(term.abs())
        for channel in whole.split(1, dim=1):
            one = rescaled(channel) if by_channel else channel
            total += functional.interpolate(one, size=images.shape[-2:], mode="bilinear")
    return total


@pytest.mark.parametrize(("name", "by_channel"), [("fullgrad", False), ("fullgrad_eq32", True)])
def test_fullgrad_against_a_slow_loop_over_layers_and_channels(name: str, by_channel: bool) -> None:
    model, images = net(), pictures()
    expected = slow_fullgrad(model, images, 1, by_channel=by_channel)
    torch.testing.assert_close(METHODS[name](model, images, 1), expected.detach())


@pytest.mark.parametrize("name", ["fullgrad", "fullgrad_eq32", "fullgrad_signed"])
def test_the_configs_are_these_methods(name: str) -> None:
    config = compose_run(["experiment=saliency_gallery", f"saliency={name}"])["saliency"]
    model, images = net(), pictures()
    torch.testing.assert_close(build(config, where="saliency")(model, images, 1), METHODS[name](model, images, 1))


def test_fullgrad_is_the_sum_of_its_layers() -> None:
    model, images = net(), pictures()
    method = FullGrad(psi=PSI, separate=False)
    layers = method.layers(model, images)
    assert list(layers) == ["input", "features.norm1", "features.norm2", "features.norm3"]
    torch.testing.assert_close(sum(layers.values()), method(model, images))


def test_signed_fullgrad_and_the_linear_layers_bias_sum_up_to_the_logit() -> None:
    """Without ψ's nonlinear steps FullGrad stays complete; planes of full size need no upsampling (Eq. 3.1)."""
    model, images = net(layers=[6, 7]), pictures()
    signed = METHODS["fullgrad_signed"](model, images, 3).sum((1, 2, 3))
    torch.testing.assert_close(signed + model.linear.bias[3], model(images)[:, 3])


@pytest.mark.parametrize("kind", [FullGrad, SmoothFullGrad, SimpleFullGrad])
def test_a_map_without_most_of_the_logit_is_a_warning(kind: type[FullGrad]) -> None:
    model, images = net(), pictures()
    nn.init.zeros_(model.linear.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind()(model, images)
        nn.init.constant_(model.linear.bias, 1e6)
        if kind is SimpleFullGrad:  # it has no biases
            kind()(model, images)
    if kind is not SimpleFullGrad:
        with pytest.warns(UserWarning, match=r"more than 90% of an output has no spatial .*share_without_place\(model"):
            kind()(model, images)
        torch.testing.assert_close(kind().share_without_place(model, images), torch.ones(3).double(), rtol=1e-3, atol=0)


def test_completeness_error_is_rounding() -> None:
    for separate in (False, True):
        method, model, images = FullGrad(psi=PSI, separate=separate), net(), pictures()
        assert torch.equal(completeness(method, model, images)["completeness_error"], method.completeness_error(model, images))
        error = method.completeness_error(model.train(), images)
        assert error.shape == (3,)
        assert error.max() < 1e-12


def test_fullgrad_of_a_linear_model() -> None:
    """|w ⊙ x|; the one bias has no spatial location."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).double()
    images = pictures()
    expected = (model[1].weight[1].view(3, 8, 8) * images).abs().sum(1, keepdim=True)
    torch.testing.assert_close(FullGrad(psi=["abs", "upsample"], separate=False)(model, images, 1), expected.detach())


def test_saturation_is_attributed_to_the_biases() -> None:
    """§3.4.1: f(x) = a - relu(b - x) with a = b = 1 at x = 2 attributes (1, 0) to (a, b), and nothing to x."""
    first, second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten())
    for conv, weight in ((first, -1.0), (second, -1.0)):
        nn.init.constant_(conv.weight, weight)
        nn.init.ones_(conv.bias)  # type: ignore[arg-type]
    full = FullGrad(psi=["upsample"], separate=False).layers(model, torch.full((1, 1, 1, 1), 2.0), 0)
    assert {name: float(value) for name, value in full.items()} == {"input": 0, "0": 0, "2": 1}


def test_example_2_input_gradients_ignore_both_biases_and_full_gradients_neither() -> None:
    """f = w₁ relu(w₀ x + b₀) + b₁: ∇f = w₁ w₀ for all b₁, and for all b₀ that keep the unit on; the bias-gradients move."""
    first, second = nn.Conv2d(1, 1, 1).double(), nn.Conv2d(1, 1, 1).double()
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten())
    w0, w1, x = 2.0, -3.0, 0.7

    def maps(b0: float, b1: float) -> list[float]:
        with torch.no_grad():
            for layer, weight, bias in ((first, w0, b0), (second, w1, b1)):
                layer.weight.fill_(weight)
                layer.bias.fill_(bias)  # type: ignore[union-attr]
        image = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        gradient = InputGradient(channels="sum")(model, image, 0)
        full = FullGrad(psi=["upsample"], separate=False).layers(model, image, 0)
        return [float(value) for value in (gradient, full["0"], full["2"])]

    for b0, b1 in ((0.5, 1.0), (0.6, 1.0), (0.5, 1000.0)):
        assert maps(b0, b1) == pytest.approx([w1 * w0, w1 * b0, b1])
    assert maps(-2.0, 1.0) == [0, 0, 1]  # a change of b₀ that is not small switches the unit off


def hinge(offset: float) -> nn.Module:
    """f = 2 x₁ + x₂ + 3 relu(x₁ + x₂ - offset) for positive x: two linear pieces, the same ∇f on each for every offset."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
        first.bias.copy_(torch.tensor([-offset, 0.0]))
        second.weight.copy_(torch.tensor([[3.0, 1.0]]))
        second.bias.zero_()
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).double().eval().requires_grad_(False)


def full_gradients(model: nn.Module, image: Tensor) -> Tensor:
    full = gradients.full_gradient(model, image, torch.tensor([0]))
    return torch.cat([full.input.flatten(), *(values.flatten() for values in full.biases.values())])


WEAK_OR_COMPLETE: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool, bool]] = {
    "input-gradient": (InputGradient(channels="sum"), True, False),
    "integrated gradients": (IntegratedGradients(steps=100, channels="sum"), False, True),
    "FullGrad": (METHODS["fullgrad_signed"], False, False),
    "full-gradients": (full_gradients, True, True),
}


@pytest.mark.parametrize("name", WEAK_OR_COMPLETE)
def test_proposition_4_no_saliency_map_is_both_weakly_dependent_and_complete(name: str) -> None:
    """Weak: constant on a linear piece. Complete from 0: never the same for two functions whose f(x) - f(0) differ.

    The proof's two functions have the slopes in common and differ in the offset, for which a map of D numbers has no room;
    full-gradients are no map: they have D + F numbers, and are both.
    """
    method, weak, complete = WEAK_OR_COMPLETE[name]
    here, there, origin = point(1.0, 0.5), point(0.8, 1.6), point(0.0, 0.0)
    model, other = hinge(1.0), hinge(1.2)
    rises = [float(one(here) - one(origin)) for one in (model, other)]
    assert rises[0] != pytest.approx(rises[1], abs=0.1)
    assert torch.allclose(method(model, here), method(model, there), atol=0.05) == weak
    assert (not torch.allclose(method(model, here), method(other, here), atol=0.05)) == complete


def test_full_gradients_feel_a_parameter_if_and_only_if_the_function_does() -> None:
    """§3.4.1: ∂G/∂θ = 0 iff ∂f/∂θ = 0, since f is a sum of G's entries, those of the input weighted by x (Eq. 3.1)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    image = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    full = gradients.full_gradient(model.eval(), image, torch.tensor([0]), differentiable=True)
    terms = torch.cat([(full.input * full.images).flatten(), *(values.flatten() for values in full.biases.values())])
    entries = torch.cat([full.input.flatten(), *(values.flatten() for values in full.biases.values())])

    def slopes(value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
        pairs = zip(found, model.parameters(), strict=True)
        return torch.cat([(torch.zeros_like(p) if slope is None else slope).flatten() for slope, p in pairs])

    of_function = slopes(model(image).sum())
    torch.testing.assert_close(slopes(terms.sum()), of_function)
    felt = torch.stack([slopes(entry).abs() for entry in entries]).sum(0)
    assert 10 < int((of_function == 0).sum()) < len(of_function) - 10  # units that are off, and units that are on
    assert torch.equal(felt > 1e-12, of_function.abs() > 1e-12)


def test_explicit_and_implicit_biases_by_hand() -> None:
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, -2.0]))  # type: ignore[union-attr]
        norm.weight.copy_(torch.tensor([2.0, 1.0]))
        norm.bias.copy_(torch.tensor([0.5, 0.0]))
        norm.running_mean.copy_(torch.tensor([3.0, -1.0]))  # type: ignore[union-attr]
        norm.running_var.copy_(torch.tensor([4.0, 0.25]) - norm.eps)  # type: ignore[union-attr]
    found = gradients.biases_of(model)
    torch.testing.assert_close(found["explicit"], torch.tensor([1.0, -2.0, 0.5, 0.0]))
    torch.testing.assert_close(found["implicit"], torch.tensor([-3.0, 2.0]))
    assert not len(gradients.biases_of(nn.Conv2d(1, 1, 1))["implicit"])


# --- the author's last release ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """A convolution without a bias and one with, a normalisation, a curved activation, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bare, self.norm = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.biased, self.linear = nn.Conv2d(5, 4, 3, stride=2, padding=1), nn.Linear(4, 3)
        self.curved = nn.Softplus()
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]
        nn.init.uniform_(self.norm.weight, 0.5, 2)
        nn.init.normal_(self.norm.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.after_norm(self.norm(self.bare(images)))

    def after_norm(self, features: Tensor) -> Tensor:
        return self.after_biased(self.biased(self.curved(features)))

    def after_biased(self, features: Tensor) -> Tensor:
        return self.linear(functional.relu(features).mean((2, 3)))


def slopes_by_hand(model: Mixed, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Gradients of the labels' logits at the images, behind the normalisation, and behind the convolution with a bias."""
    normed = model.norm(model.bare(images)).detach()
    late = model.biased(model.curved(normed)).detach()
    found = []
    for values, head in ((images, model), (normed, model.after_norm), (late, model.after_biased)):
        values = values.clone().requires_grad_()
        logits = head(values).gather(1, labels[:, None])
        found.append(torch.autograd.grad(logits.sum(), values)[0])
    return found


def reference_psi(maps: Tensor, size: int) -> Tensor:
    """Image by image: minus the smallest, divided by the largest + 1e-6; every channel upsampled corner to corner."""
    total = []
    for one in maps.abs():
        one = one - one.min()
        one = (one / (one.max() + 1e-6))[None]
        large = functional.interpolate(one, size=(size, size), mode="bilinear", align_corners=True)
        total.append(large.sum(1, keepdim=True))
    return torch.cat(total)


def reference_biases(model: Mixed) -> list[Tensor]:
    norm = model.norm
    inverse = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    biases = [norm.bias - norm.running_mean * inverse, model.biased.bias]  # type: ignore[operator]
    return [bias.detach().view(1, -1, 1, 1) for bias in biases]  # type: ignore[union-attr]


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("name", ["fullgrad", "simple_fullgrad", "smooth_fullgrad"])
def test_reference_variants_from_their_formulas(name: str, target: int | None) -> None:
    """The bias-free convolution, the softplus and the linear layer have no map."""
    torch.manual_seed(5)
    model, images = Mixed().double().eval(), pictures() - 0.5
    biases = reference_biases(model)

    def labels(images: Tensor) -> Tensor:
        return model(images).argmax(1) if target is None else torch.full((3,), target)

    if name == "smooth_fullgrad":
        torch.manual_seed(3)
        sums: list[Tensor] = []
        for _ in range(4):
            noisy = images + 0.3 * (images.max() - images.min()) * torch.randn_like(images)
            slope, *rest = slopes_by_hand(model, noisy, labels(noisy))
            terms = [(slope * noisy).sum(1, keepdim=True), *(z * b for z, b in zip(rest, biases, strict=True))]
            sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
        method: Saliency = ReferenceSmoothFullGrad(samples=4, sigma=0.3)
    else:
        slope, *rest = slopes_by_hand(model, images, labels(images))
        factors = biases if name == "fullgrad" else [torch.ones(1)] * 2
        sums = [slope * images, *(z * b for z, b in zip(rest, factors, strict=True))]
        method = METHODS[f"{name}_reference"]
    expected = torch.stack([reference_psi(term, 8) for term in sums]).sum(0)
    torch.manual_seed(3)
    torch.testing.assert_close(method(model, images, target), expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["convolutions with biases", "without"])
def test_the_authors_full_gradients_are_ours_where_his_are_complete(bias: bool) -> None:
    """A VGG with batch normalisation and ReLU, whose linear layers have no biases: every bias has a map."""
    widths, stages = [3, 6, 6, 8], list[nn.Module]()
    for inputs, outputs in itertools.pairwise(widths):
        stages += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False))
    model, images, labels = randomised(nn.Sequential(*stages, *head)), pictures(), torch.tensor([0, 3, 1])
    full = gradients.full_gradient(model, images, labels, separate=True)
    ours = [full.input * images, *full.planes().values()]
    theirs = ReferenceFullGrad().terms(model, images, labels)
    assert len(ours) == len(theirs) == (7 if bias else 4)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)
    logits = model(images)[torch.arange(3), labels]
    torch.testing.assert_close(torch.stack([term.flatten(1).sum(1) for term in theirs]).sum(0), logits, rtol=1e-12, atol=1e-14)
    assert not full.outside().any()


def test_reference_gradcam_by_hand() -> None:
    """The positive part of the convolution's own output, before its normalisation."""
    model, images = net(), pictures()
    nn.init.normal_(model.linear.weight)
    features = model.features[:8](images).detach().requires_grad_()
    logits = model.linear(model.features[8:](features).mean((2, 3)))
    (slope,) = torch.autograd.grad(logits[:, 2].sum(), features)
    small = (slope.mean((2, 3), keepdim=True) * features.detach().clamp(min=0)).sum(1, keepdim=True).clamp(min=0)
    assert small.any()
    expected = functional.interpolate(small, size=(8, 8), mode="bilinear", align_corners=True)
    torch.testing.assert_close(ReferenceGradCAM()(model, images, 2), expected)


# --- properties -------------------------------------------------------------------------------------------


def test_full_gradients_depend_weakly_on_the_input() -> None:
    """Inside a linear region every bias-gradient is constant (§3.4.1), so FullGrad moves by its input term alone."""
    model, images = net(), pictures()
    method = FullGrad(psi=["abs", "upsample"], separate=False)
    near, here = method.layers(model, images + 1e-9, 0), method.layers(model, images, 0)
    for name in set(here) - {"input"}:
        torch.testing.assert_close(near[name], here[name], rtol=1e-12, atol=1e-14)
    assert not torch.equal(near["input"], here["input"])


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, mean over images; away from the border, whose zero padding all models see."""
    ranks = [maps[..., 4:-4, 4:-4].flatten(1).argsort(1).argsort(1).double() for maps in (first, second)]
    centred = [values - values.mean(1, keepdim=True) for values in ranks]
    return float(functional.cosine_similarity(*centred, dim=1).mean())


def test_randomising_layers_changes_the_map() -> None:
    """The sanity check of Adebayo et al. (2018): the more layers are random, the less is left of the map."""
    model, other = net(layers=[16, 16, "M", 16, 16]), net(layers=[16, 16, "M", 16, 16])
    images = torch.randn(20, 3, 16, 16, dtype=torch.float64)
    original = METHODS["fullgrad"](model, images, 0)
    correlations = []
    for part in ("linear", "4", "3", "2", "1"):
        names = [name for name, _ in model.named_modules() if name in (part, f"features.conv{part}", f"features.norm{part}")]
        for name in names:
            model.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
        correlations.append(rank_correlation(original, METHODS["fullgrad"](model, images, 0)))
    assert 0.2 < correlations[0] < 0.9
    assert abs(correlations[-1]) < 0.15


def test_psi_sums_channels_before_it_upsamples_and_is_exact() -> None:
    maps = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    for steps in (["upsample"], ["abs", "upsample"], ["positive", "rescale", "upsample"], PSI, ["negative", "upsample"]):
        values = {"abs": maps.abs(), "positive": maps.clamp(min=0), "negative": (-maps).clamp(min=0)}.get(steps[0], maps)
        values = rescaled(values) if "rescale" in steps else values
        late = functional.interpolate(values, size=(6, 9), mode="bilinear").sum(1, keepdim=True)
        torch.testing.assert_close(psi(maps, steps, (6, 9)), late)


def test_psi_by_channel_is_equation_3_2() -> None:
    maps = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    each = torch.cat([rescaled(maps[:, c : c + 1].abs()) for c in range(5)], 1)
    torch.testing.assert_close(psi(maps, ["abs", "rescale_channels", "upsample"], (3, 4)), each.sum(1, keepdim=True))


def test_a_constant_map_says_nothing() -> None:
    assert not psi(torch.full((1, 2, 3, 3), 0.3), PSI, (6, 6)).any()


@pytest.mark.parametrize("name", ["fullgrad", "simple_fullgrad", "smooth_fullgrad"])
def test_a_map_is_the_sum_of_those_of_its_layers(name: str) -> None:
    model, images, method = net(), pictures(), METHODS[name]
    assert isinstance(method, FullGrad)
    torch.manual_seed(0)
    layers = method.layers(model, images, 0)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.stack(list(layers.values())).sum(0), method(model, images, 0))


def test_variants_of_fullgrad() -> None:
    """Smooth without noise is FullGrad; simple is FullGrad of a model whose biases are all 1, and needs none."""
    model, images = net(), pictures()
    still = SmoothFullGrad(psi=PSI, separate=False, samples=2, sigma=0)
    torch.testing.assert_close(still(model, images, 0), METHODS["fullgrad"](model, images, 0))
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 8), nn.Flatten()).double()
    for conv in (plain[0], plain[2]):
        nn.init.ones_(conv.bias)  # type: ignore[arg-type]
    simple = METHODS["simple_fullgrad"](plain, images, 0)
    torch.testing.assert_close(simple, METHODS["fullgrad"](plain, images, 0))
    for conv in (plain[0], plain[2]):
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    zero = METHODS["simple_fullgrad"](plain, images, 0)
    for conv in (plain[0], plain[2]):
        conv.bias = None
    torch.testing.assert_close(METHODS["simple_fullgrad"](plain, images, 0), zero)


@pytest.mark.filterwarnings("ignore:more than 90% of an output")
def test_smooth_fullgrad_by_hand() -> None:
    """Noise is a part of each image's own range, terms are averaged before ψ, and the class is that of the clean image."""
    model, images = net(), pictures()
    images[1], images[2] = 7 * images[1], images[2] - 3
    model.linear.bias.data -= model(images).mean(0)  # so that noise changes predictions
    labels = model(images).argmax(1)
    spans = torch.stack([image.max() - image.min() for image in images]).view(3, 1, 1, 1)
    torch.manual_seed(2)
    copies = [images + 0.8 * spans * torch.randn_like(images) for _ in range(4)]
    assert any(not torch.equal(model(noisy).argmax(1), labels) for noisy in copies)
    fulls = [gradients.full_gradient(model, noisy, labels) for noisy in copies]
    biases = [[full.biases[f"features.norm{number}"] for full in fulls] for number in (1, 2, 3)]
    terms = [torch.stack(each).mean(0) for each in ([full.input * full.images for full in fulls], *biases)]
    expected = [functional.interpolate(term.abs().sum(1, keepdim=True), size=(8, 8), mode="bilinear") for term in terms]
    torch.manual_seed(2)
    found = SmoothFullGrad(psi=["abs", "upsample"], separate=False, samples=4, sigma=0.8)(model, images)
    torch.testing.assert_close(found, torch.stack(expected).sum(0))


def test_simple_fullgrad_has_no_map_behind_an_activation() -> None:
    """A softplus has an implicit bias, so that full-gradients look behind it; simple FullGrad looks before activations only."""
    model, images = Mixed().double().eval(), pictures()
    found = SimpleFullGrad(psi=["upsample"], separate=False).layers(model, images, 0)
    assert list(found) == ["input", "norm", "biased"]
    assert "curved" in FullGrad(psi=["upsample"], separate=False).layers(model, images, 0)
    slope = slopes_by_hand(model, images, torch.zeros(3, dtype=torch.long))[1].sum(1, keepdim=True)
    torch.testing.assert_close(found["norm"], slope)
