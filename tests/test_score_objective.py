"""The objective of score-matching in eval mode, statistics estimated again, and energy at high frequencies, as mathematics."""

import copy
import math

import pytest
import torch
from test_score_matching import batch, resnet, slope_at
from tiny import Quadratic
from torch import Tensor, nn

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.evaluate.score_objective import objective, objective_parts
from gradexp.evaluate.spectrum import high_frequency
from gradexp.evaluate.statistics import reestimate

# --- the objective ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [layers.accelerate, lambda model: model], ids=["fast", "autograd"])
def test_the_objective_is_unbiased_for_the_exact_one(prepared: object) -> None:
    """Against the trace entry by entry of the Hessian; its standard error is that of its own repetitions."""
    data = batch(2)
    model = prepared(resnet().eval())  # type: ignore[operator]
    gradient, images = slope_at(model, data.images, data.labels)
    exact = gradients.exact_trace(gradient, images)
    half = gradient.detach().square().flatten(1).sum(1) / 2
    copies = Batch(*(values.repeat_interleave(400, dim=0) for values in data[:4]))
    many = objective_parts(model, copies, draws=1, sigma=1e-4, seed=0).view(2, 400, 4)
    torch.testing.assert_close(many[:, 0, 2], half)
    mean, error = many[..., 0].mean(1), many[..., 0].std(1) / 20
    assert (error < 0.2 * exact.abs()).all()
    assert ((mean - exact).abs() < 4 * error).all()
    averaged = objective_parts(model, data, draws=100, sigma=1e-4, seed=1)[:, 0]
    assert ((averaged - exact).abs() < 4 * 2 * error).all()


def test_the_taylor_trace_is_equation_5_9_along_the_same_directions() -> None:
    """On a quadratic the two differ by the slope's noise alone: 2 <∇f, v> / σ."""
    model, data, sigma = Quadratic(8), batch(3, size=2), 0.1
    exact, taylor, *_ = objective_parts(model, data, draws=1, sigma=sigma, seed=3).unbind(1)
    direction = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(3)).double()
    slope = gradients.input_gradient(model, data.images, data.labels)
    torch.testing.assert_close(taylor - exact, 2 / sigma * (slope * direction).flatten(1).sum(1))
    by_hand = torch.einsum("bi,bij,bj->b", direction.flatten(1), model.matrix[data.labels], direction.flatten(1))
    torch.testing.assert_close(exact, by_hand)


def test_the_objective_of_the_true_density_is_least() -> None:
    """Of Gaussians (Hyvärinen, 2005): of variance s for data of variance v it is D (v / (2 s²) - 1 / s), least at s = v."""

    class Bell(nn.Module):
        def __init__(self, variance: float) -> None:
            super().__init__()
            self.variance = variance

        def forward(self, x: Tensor) -> Tensor:
            return -x.square().flatten(1).sum(1, keepdim=True) / (2 * self.variance)

    count, size, variance = 20_000, 8, 0.4
    zeros = torch.zeros(count, dtype=torch.long)
    data = Batch(variance**0.5 * torch.randn(count, 2, 2, 2, dtype=torch.float64), zeros, zeros, zeros)
    found = {s: objective(objective_parts(Bell(s), data, draws=2, sigma=0.01, seed=0)) for s in (0.2, 0.4, 0.8)}
    for s, numbers in found.items():
        assert abs(numbers["objective"] - size * (variance / (2 * s**2) - 1 / s)) < 4 * numbers["objective/error"]
        assert numbers["objective"] == pytest.approx(numbers["trace"] + numbers["half_gradient_norm"])
        assert numbers["objective/error"] == pytest.approx(numbers["objective/std"] / count**0.5)
    assert found[0.4]["objective"] < min(found[0.2]["objective"], found[0.8]["objective"])


# --- statistics estimated again ---------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [layers.accelerate, lambda model: model], ids=["fast", "autograd"])
def test_reestimated_statistics_are_those_of_all_images_as_one_batch(prepared: object) -> None:
    """In eval mode as in train mode with the whole set, however it is batched; parameters and modes stay."""
    images = torch.rand(13, 2, 8, 8, dtype=torch.float64)
    for size in (13, 5, 1):
        model = prepared(resnet())  # type: ignore[operator]
        before = {name: value.clone() for name, value in model.named_parameters()}
        together = copy.deepcopy(model).train()(images)
        assert not torch.allclose(model(images), together, rtol=1e-3)
        reestimate(model, lambda size=size: torch.split(images, size))
        torch.testing.assert_close(model(images), together, rtol=1e-10, atol=1e-10)
        assert not any(module.training for module in model.modules())
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, before[name])


def test_a_normalisation_that_is_called_twice_is_an_error() -> None:
    norm = nn.BatchNorm2d(2)
    with pytest.raises(UserError, match="twice"):
        reestimate(nn.Sequential(norm, nn.Softplus(), norm), lambda: [torch.rand(3, 2, 4, 4)])


# --- energy at high frequencies ---------------------------------------------------------------------------


def wave(across: int, down: int = 0) -> Tensor:
    """A wave of this many periods in each direction, 16 x 16 pixels."""
    at = 2 * math.pi * torch.arange(16, dtype=torch.float64) / 16
    return torch.cos(down * at[:, None] + across * at[None])[None, None]


@pytest.mark.parametrize(
    ("picture", "percent"), [(wave(3), 0), (wave(4), 0), (wave(5), 100), (wave(0, 7), 100), (wave(3, 3), 100)]
)
def test_a_wave_above_a_quarter_of_a_cycle_per_pixel_is_high_frequency(picture: Tensor, percent: float) -> None:
    assert high_frequency(picture).item() == pytest.approx(percent, abs=1e-9)


def test_high_frequency_does_not_depend_on_scale_and_mean() -> None:
    mixed = torch.cat([3 * wave(2) + 4 * wave(6), 0 * wave(1)], dim=1)
    other = torch.cat([3 * wave(2), 4 * wave(6)], dim=1)
    assert high_frequency(torch.cat([mixed, 7 + 0.1 * mixed, other])).tolist() == pytest.approx([64.0] * 3)
    assert high_frequency(torch.ones(1, 3, 8, 8)).isnan().all()


def test_high_frequency_of_white_noise() -> None:
    """The disc of radius 1/4 in the square of side 1 leaves 1 - π / 16."""
    noise = torch.randn(64, 3, 32, 32)
    assert high_frequency(noise).mean().item() == pytest.approx(100 * (1 - math.pi / 16), abs=1)
    smooth = nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    assert (high_frequency(smooth) < high_frequency(noise) - 20).all()
