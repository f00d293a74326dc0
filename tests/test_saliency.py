"""Saliency methods: the thesis's examples by hand, completeness, sanity, and an independent FullGrad."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradexp import layers
from gradexp.errors import UserError
from gradexp.layers import convolution
from gradexp.models.vgg import VGG
from gradexp.saliency import (
    FullGrad,
    GradCAM,
    GradientTimesInput,
    InputGradient,
    IntegratedGradients,
    Random,
    Saliency,
    SimpleFullGrad,
    SmoothFullGrad,
    SmoothGrad,
    SmoothGradSquared,
)
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
    "gradcam": GradCAM(layer=None),
    "fullgrad": FullGrad(psi=PSI, separate=False),
    "fullgrad_separate": FullGrad(psi=["abs", "rescale_channels", "upsample"], separate=True),
    "fullgrad_signed": FullGrad(psi=["upsample"], separate=False),
    "simple_fullgrad": SimpleFullGrad(psi=PSI, separate=False),
    "smooth_fullgrad": SmoothFullGrad(psi=PSI, separate=False, samples=2, sigma=0.15),
}
DETERMINISTIC = [name for name in METHODS if name not in ("random", "smoothgrad", "smoothgrad_squared", "smooth_fullgrad")]


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
    "targets of another number": (lambda: METHODS["input_gradient"](net(), pictures(), torch.tensor([0, 1])), "one an image"),
    "layer without a map": (lambda: GradCAM(layer="linear")(net(), pictures()), "its output is no map"),
    "negative target": (lambda: METHODS["input_gradient"](net(), pictures(), torch.tensor([0, -1, 2])), "target=-1"),
    "grey image": (lambda: METHODS["gradcam"](net(), pictures()[:, :1]), "the model takes 3"),
    "no batch": (lambda: METHODS["gradcam"](net(), pictures()[0]), r"takes \(B, C, H, W\)"),
    "too small": (lambda: METHODS["smoothgrad"](net(), pictures(size=1)), "at least 4 pixels"),
    "no features": (
        lambda: GradCAM(layer=None)(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2)),
        "spatial",
    ),
    "layer": (lambda: GradCAM(layer="features.conv9")(net(), pictures()), "features.conv3"),
    "nan": (lambda: METHODS["fullgrad"](net(), pictures() * torch.nan), "not finite"),
    "psi": (lambda: FullGrad(psi=["rescale", "abs", "upsample"], separate=False), r"\[abs, rescale, upsample\]"),
    "channels": (lambda: InputGradient(channels="max")(net(), pictures()), "abs, sum, square, std"),
}


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


def test_gradcam_by_hand() -> None:
    model, images = net(), pictures()
    with torch.enable_grad():
        features = model.features[:8](images).detach().requires_grad_()  # as far as the last convolution
        assert isinstance(model.features[7], nn.Conv2d)
        logits = model.linear(model.features[8:](features).mean((2, 3)))
        (gradient,) = torch.autograd.grad(logits[:, 2].sum(), features)
    small = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()
    expected = functional.interpolate(small, size=(8, 8), mode="bilinear")
    torch.testing.assert_close(GradCAM(layer=None)(model, images, 2), expected)


# --- FullGrad ---------------------------------------------------------------------------------------------


def rescaled(maps: Tensor) -> Tensor:
    """Each image's (C, h, w) to [0, 1]."""
    return torch.stack([(one - one.min()) / (one.max() - one.min()) for one in maps])


def slow_fullgrad(model: VGG, images: Tensor, target: int) -> Tensor:
    """Eq. 3.2 layer by layer and channel by channel, from the definition: f^b = bias times slope, by autograd of the bias.

    A block's bias is what conv and batch normalisation add at input 0 far from the border.
    """
    total = torch.zeros_like(images[:, :1])
    inputs = images.clone().requires_grad_()
    model(inputs)[:, target].sum().backward()
    terms = [rescaled((inputs.grad * images).abs())]  # type: ignore[operator]
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
        terms.append(rescaled((slope * bias.view(1, -1, 1, 1)).abs()))
    for term in terms:
        for channel in term.unbind(1):
            total += functional.interpolate(channel[:, None], size=images.shape[-2:], mode="bilinear")
    return total


def test_fullgrad_against_a_slow_loop_over_layers_and_channels() -> None:
    model, images = net(), pictures()
    torch.testing.assert_close(METHODS["fullgrad"](model, images, 1), slow_fullgrad(model, images, 1).detach())


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


def test_completeness_error_is_rounding() -> None:
    for separate in (False, True):
        method, model, images = FullGrad(psi=PSI, separate=separate), net(), pictures()
        assert torch.equal(
            completeness(method, model, images, 2)["completeness_error"], method.completeness_error(model, images, 2)
        )
        error = method.completeness_error(model.train(), images)
        assert error.shape == (3,)
        assert error.max() < 1e-12


def test_fullgrad_of_a_linear_model() -> None:
    """|w ⊙ x|; the one bias lies in no plane."""
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


def test_example_2_input_gradients_ignore_the_last_bias_and_full_gradients_do_not() -> None:
    first, second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.Flatten())
    image = torch.full((1, 1, 1, 1), 0.7)
    nn.init.ones_(first.weight)
    before = [method(model, image, 0) for method in (InputGradient(channels="sum"), METHODS["fullgrad_signed"])]
    with torch.no_grad():
        second.bias += 5  # type: ignore[operator]
    after = [method(model, image, 0) for method in (InputGradient(channels="sum"), METHODS["fullgrad_signed"])]
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1] - before[1], torch.full((1, 1, 1, 1), 5.0))


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
