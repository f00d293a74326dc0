"""Sampling the implicit density, and what is measured of it."""

import math

import pytest
import torch
from scipy.stats import beta
from test_score_matching import batch, net
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.evaluate.density_ratio import density_ratio
from gradexp.evaluate.energy import energy_inside
from gradexp.evaluate.gan_test import gan_test
from gradexp.sampling import Ascent

SHAPE = (2, 4, 4)


def ascent(**changes: object) -> Ascent:
    options = {"steps": 20, "rate": 0.1, "pull": 0.01, "langevin": 0, "start": [0.5, 0.2], "noise": 0.1}
    return Ascent(**{**options, **changes})  # type: ignore[arg-type]


class Slope(nn.Module):
    """Logit k is <g_k, x>: its ascent is known step by step."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.slopes = slopes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.slopes.flatten(1).T


def test_one_step_of_the_ascent() -> None:
    model = Slope(torch.randn(3, *SHAPE)).eval()
    images, labels = torch.rand(5, *SHAPE), torch.tensor([0, 1, 2, 1, 0])
    one = ascent(steps=1, noise=0)
    found = one.denoise(model, images, labels, range(5))[1]
    expected = (images + 0.1 * (model.slopes[labels] - 0.01 * (images - 0.5))).clamp(0, 1)
    torch.testing.assert_close(found, expected)


def test_sampling_climbs_the_logit_and_stays_in_the_box() -> None:
    model, labels = net().float(), torch.tensor([0, 1, 2, 0])
    samples = [ascent(steps=steps, rate=0.01).sample(model, labels, range(4), SHAPE) for steps in (1, 10, 60)]
    climbed = [gradients.scalar(model(x), labels, "label").detach() for x in samples]
    assert (climbed[1] > climbed[0]).all()
    assert (climbed[2] > climbed[1]).all()
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in samples)


@pytest.mark.parametrize("langevin", [0.0, 1.0])
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(langevin: float) -> None:
    model, labels = net().float(), torch.tensor([0, 1, 2, 0, 1])
    some = ascent(langevin=langevin)
    together = some.sample(model, labels, range(10, 15), SHAPE)
    alone = torch.cat([some.sample(model, labels[i : i + 1], [10 + i], SHAPE) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, some.sample(model, labels, range(20, 25), SHAPE), atol=1e-2)


def test_langevin_noise_samples_a_gaussian_density() -> None:
    """Small steps on a quadratic log-density end in its Gaussian (§1.5.1), whose tails the box hardly cuts."""

    class Bell(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -(x - 0.5).square().flatten(1).sum(1, keepdim=True) / (2 * 0.1**2)

    count = 300
    chain = ascent(steps=300, rate=2e-4, pull=0, langevin=1)
    values = chain.sample(Bell().eval(), torch.zeros(count, dtype=torch.long), range(count), (1, 4, 4))
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert values.std().item() == pytest.approx(0.1, rel=0.05)


def test_settings_out_of_range_and_train_mode_are_errors() -> None:
    for name, wrong in {"start": [0.5, -0.2], "noise": -0.1, "langevin": -1.0}.items():
        with pytest.raises(UserError, match=f"{name}=.*: it should be greater than or equal to 0"):
            ascent(**{name: wrong})
    with pytest.raises(UserError, match="steps=0: it should be greater than or equal to 1"):
        ascent(steps=0)
    with pytest.raises(UserError, match="rate=0: it should be greater than 0"):
        ascent(rate=0)
    with pytest.raises(UserError, match=r"start=\[0.5\]: it is incomplete"):
        ascent(start=[0.5])
    with pytest.raises(UserError, match="eval mode"):
        ascent().sample(net().float().train(), torch.tensor([0]), [0], SHAPE)
    with pytest.raises(UserError, match=r"sigmas=.*: it should be greater than or equal to 0"):
        density_ratio(net(), [batch()], sigmas=[-0.1], seed=0)


def test_the_gan_test_is_an_accuracy_with_the_interval_of_clopper_and_pearson() -> None:
    judge = Slope(torch.eye(3).view(3, 3, 1, 1))
    labels = torch.arange(3).repeat(20)
    samples = torch.eye(3)[labels].view(-1, 3, 1, 1)
    samples[:6] = samples[:6].roll(1, dims=1)
    found = gan_test(judge, samples, labels, confidence=0.95)
    low, high = beta.ppf(0.025, 54, 7), beta.ppf(0.975, 55, 6)
    assert [found[name] for name in ("gan_test", "gan_test/low", "gan_test/high")] == pytest.approx(
        [90, 100 * low, 100 * high], abs=1e-3
    )


def test_the_gan_test_of_a_diverged_model_is_nan() -> None:
    judge = Slope(torch.eye(3).view(3, 3, 1, 1))
    found = gan_test(judge, torch.full((2, 3, 1, 1), math.nan), torch.tensor([0, 1]), confidence=0.95)
    assert all(math.isnan(value) for value in found.values())


def test_density_ratio_of_a_linear_logit_is_log_normal() -> None:
    """exp<g, η> has mean exp(sigma^2 |g|^2 / 2), and its logarithm is Gaussian around 0."""
    slopes = 0.2 * torch.randn(3, *SHAPE)
    count = 20_000
    labels = torch.zeros(count, dtype=torch.long)
    data = Batch(torch.rand(count, *SHAPE), labels, labels, labels)
    found = density_ratio(Slope(slopes), [data], sigmas=[0.0, 0.5, 1.0], seed=0)
    size = slopes[0].norm().item()
    assert found["density_ratio"] == pytest.approx([math.exp((s * size) ** 2 / 2) for s in (0, 0.5, 1)], rel=0.05)
    variances = (math.exp(2 * (s * size) ** 2) - math.exp((s * size) ** 2) for s in (0, 0.5))  # log-normal
    ratios = [math.sqrt(variance) for variance in variances]
    assert found["density_ratio/std"][:2] == pytest.approx(ratios, rel=0.1)
    assert found["density_ratio/log_std"] == pytest.approx([0, size / 2, size], rel=0.03)
    assert found["density_ratio/log"] == pytest.approx([0, 0, 0], abs=4 * size / count**0.5)


def test_energy_of_a_gradient_made_by_hand() -> None:
    gradient = torch.zeros(2, 2, 4, 4)
    gradient[0, 0, 0, 0], gradient[0, 1, 3, 3], gradient[0, 1, 1, 1] = -3.0, 1.0, 1.0
    mask = torch.zeros(4, 4)
    mask[:2, :2] = 1
    energy = energy_inside(gradient, mask)
    assert energy[0].item() == pytest.approx(80)
    assert energy[1].isnan()


def test_a_common_shift_does_not_change_the_loss_gradient_of_a_confident_image_in_float32() -> None:
    """p_y - 1 rounds where p_y is near 1, and the shift's gradient would remain, times the sum of the rounded weights."""
    torch.manual_seed(0)
    rivals, shift = 0.1 * torch.randn(100, *SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    labels = torch.tensor([0])
    image = 50 * rivals[0] / rivals[0].norm() / rivals[0].norm()  # its class leads by about 50: p_y rounds to 1
    assert Slope(rivals.float())(image[None].float()).softmax(1)[0, 0] == 1
    exact = gradients.loss_gradient(Slope(rivals), image[None], labels, temperature=1.0)
    found = gradients.loss_gradient(Slope((rivals + shift).float()), image[None].float(), labels, temperature=1.0)
    torch.testing.assert_close(found.double() / exact.norm(), exact / exact.norm(), rtol=0, atol=1e-4)


def test_loss_gradient_against_equation_5_6() -> None:
    """-∇f_i + Σ_j p_j ∇f_j, at a temperature T with both the logits and p divided."""
    model, data = net(), batch()
    for temperature in (1.0, 1000.0):
        found = gradients.loss_gradient(model, data.images, data.labels, temperature=temperature)
        jacobian = gradients.input_gradient(model, data.images, data.labels, target="all") / temperature
        p = (model(data.images).detach() / temperature).softmax(1)
        expected = torch.einsum("bk,bkchw->bchw", p, jacobian) - jacobian[torch.arange(3), data.labels]
        torch.testing.assert_close(found, expected)
