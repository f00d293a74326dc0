"""Traces of the Hessian, score-matching and fooling, as mathematics."""

import copy

import pytest
import torch
from tiny import CLASSES, Quadratic, randomised
from torch import Tensor, nn

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.models.resnet import ResNet
from gradexp.models.vgg import VGG
from gradexp.terms import AntiScoreMatching, Fooling, ScoreMatching, Step
from gradexp.terms.fooling import corner


def softplus() -> nn.Module:
    return nn.Softplus(beta=10)


def net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(
        VGG(name="t", layers=[4, "M", 5], width=1, channels=2, classes=CLASSES, dropout=None, activation=softplus)
    )


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomised(ResNet(name="t", blocks=[1, 1], width=1 / 16, channels=2, classes=CLASSES, activation=softplus))


def batch(count: int = 3, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(count, 2, size, size, dtype=torch.float64, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Batch(images, labels, torch.arange(count), torch.zeros(count, dtype=torch.long))


def score(**changes: object) -> ScoreMatching:
    options = {"weight": 1, "stability": 0.0, "estimator": "taylor", "sigma": 0.01, "target": "label"}
    return ScoreMatching(**{**options, **changes})  # type: ignore[arg-type]


def slope_at(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(differentiable input-gradient, the images it was taken at)."""
    images = images.detach().requires_grad_()
    logits = model(images)
    return gradients.gradient_of(logits, images, labels, target="label", differentiable=True), images


# --- estimators -------------------------------------------------------------------------------------------


def test_exact_trace_against_autograds_hessian() -> None:
    data = batch(2)
    for model in (net(), layers.accelerate(resnet())):
        exact = gradients.exact_trace(*slope_at(model, data.images, data.labels))
        for image, label, trace in zip(data.images, data.labels, exact, strict=True):
            logit = lambda x, model=model, label=label: model(x.view(1, 2, 4, 4))[0, label]
            torch.testing.assert_close(torch.autograd.functional.hessian(logit, image.flatten()).trace(), trace)


def test_the_variances_of_both_trace_estimators_are_those_of_section_5_8() -> None:
    """§5.8: Var(Hutchinson) = 2 ||A||_F^2, and Var(Taylor) is at most 4 ||grad f||^2 / sigma^2 above it."""
    model, sigma, count = Quadratic(8), 0.3, 40_000
    image = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    images, labels = image.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.long)
    gradient, points = slope_at(model, images, labels)
    hutchinson = gradients.hutchinson_trace(gradient, points, differentiable=False)
    taylor = gradients.taylor_trace(model, images, model(images), labels, sigma=sigma, target="label")
    for values in (hutchinson, taylor):
        assert abs(values.mean() - model.matrix[0].trace()) < 4 * values.std() / count**0.5
    assert hutchinson.var().item() == pytest.approx(2 * model.matrix[0].square().sum().item(), rel=0.05)
    bound = 4 * gradient[0].square().sum() / sigma**2
    assert 0 < taylor.var() - hutchinson.var() < 1.05 * bound


class Level(nn.Module):
    """A model minus its linear part at one image: the same Hessian, and no gradient noise in the Taylor estimate."""

    def __init__(self, model: nn.Module, image: Tensor, slope: Tensor) -> None:
        super().__init__()
        self.model, self.image, self.slope = model, image, slope.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) - ((x - self.image) * self.slope).flatten(1).sum(1, keepdim=True)


def test_taylor_tends_to_the_exact_trace_of_a_softplus_net_as_sigma_vanishes() -> None:
    """Draw by draw it tends to Hutchinson's product, at first order in sigma, whose mean is the trace."""
    model, data, count = net(), batch(1), 4000
    gradient, image = slope_at(model, data.images, data.labels)
    exact = gradients.exact_trace(gradient, image)
    level = Level(model, data.images, gradient)
    images, labels = data.images.expand(count, -1, -1, -1), data.labels.expand(count)
    torch.manual_seed(1)
    product = gradients.hutchinson_trace(*slope_at(level, images, labels), differentiable=False)
    assert abs(product.mean() - exact) < 4 * product.std() / count**0.5
    errors = []
    for sigma in (1e-2, 1e-3, 1e-4):
        torch.manual_seed(1)
        taylor = gradients.taylor_trace(level, images, level(images), labels, sigma=sigma, target="label")
        errors.append((taylor - product).abs().mean().item())
    assert errors[2] < 0.15 * errors[1] < 0.15**2 * errors[0]
    assert errors[2] < 1e-3 * product.std()


def test_training_through_hutchinson_is_exact_and_needs_third_derivatives() -> None:
    """Through batch statistics, against finite differences in a random direction."""
    data, term = batch(), score(estimator="hutchinson")
    fast = layers.accelerate(net()).train()
    step = Step(data, fast, differentiable_input=True)
    weight = fast.get_parameter("features.conv2.weight")
    torch.manual_seed(3)
    (slope,) = torch.autograd.grad(term(step), weight)
    direction, epsilon = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(fast)
        moved.get_parameter("features.conv2.weight").data += sign * epsilon * direction
        torch.manual_seed(3)
        values.append(term(Step(data, moved, differentiable_input=True)).item())
    assert (slope * direction).sum().item() == pytest.approx((values[0] - values[1]) / (2 * epsilon), rel=1e-4)
    with pytest.raises(UserError, match=r"gradients\.backend=fast"):
        term(Step(data, net().train(), differentiable_input=True))
    for norm in (nn.BatchNorm2d(2, momentum=None), nn.BatchNorm2d(2, affine=False), nn.InstanceNorm2d(2)):
        student = layers.accelerate(nn.Sequential(norm, net())).double().train()
        with pytest.raises(UserError, match=r"0 \(\w+\) has two: take another layer, or the taylor estimator"):
            term(Step(data, student, differentiable_input=True))


@pytest.mark.parametrize("estimator", ["taylor", "hutchinson"])
def test_with_running_statistics_score_matching_is_that_of_eval_mode(estimator: str) -> None:
    """Value and parameter gradients; running statistics do not change, and images do not influence each other."""
    data, term = batch(), score(estimator=estimator, stability=1e-4, student_bn="running")
    training, tested = layers.accelerate(net()).train(), layers.accelerate(net()).eval()
    before = {name: value.clone() for name, value in training.named_buffers()}
    values, found = [], []
    for model in (training, tested):
        torch.manual_seed(3)
        values.append(term(Step(data, model, differentiable_input=True)))
        found.append(torch.autograd.grad(values[-1], list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*values)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(module.training for module in training.modules())
    for name, value in training.named_buffers():
        torch.testing.assert_close(value, before[name])

    others = data._replace(images=torch.cat([data.images[:1], 1 - data.images[1:]]))
    for student_bn, alone in (("running", True), ("batch", False)):
        traces = []
        for one in (data, others):
            torch.manual_seed(3)
            step = Step(one, training, differentiable_input=True)
            traces.append(step.student_hessian_trace(estimator, 0.01, "label", student_bn)[0].item())
        assert (traces[0] == pytest.approx(traces[1], rel=1e-9)) is alone


# --- score-matching ---------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """One class, whose logit is the logarithm of an isotropic Gaussian without its constant."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.log_variance = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return -(x - self.mean).square().flatten(1).sum(1, keepdim=True) / (2 * self.log_variance.exp())


@pytest.mark.parametrize("estimator", ["taylor", "hutchinson"])
def test_score_matching_recovers_a_gaussian(estimator: str) -> None:
    """Hyvärinen's objective is least for the true score; on a quadratic the Taylor estimate is exact for any sigma."""
    mean, variance, count = 0.7, 0.4, 4000
    images = mean + variance**0.5 * torch.randn(count, 1, 2, 2, dtype=torch.float64)
    zeros = torch.zeros(count, dtype=torch.long)
    model, term = Gaussian(), score(estimator=estimator, sigma=1.0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        torch.manual_seed(1)  # the same noise, so that the objective is a function; not that of the images
        loss = term(Step(Batch(images, zeros, zeros, zeros), model, differentiable_input=True))
        loss.backward()
        return loss

    optimizer.step(objective)
    assert model.mean.item() == pytest.approx(mean, abs=0.05)
    assert model.log_variance.exp().item() == pytest.approx(variance, rel=0.06)


def test_anti_score_matching_has_no_gradient_above_its_ceiling() -> None:
    """The gradient is that of the images below the ceiling alone."""
    model, data = net(), batch(4)
    parameters = list(model.parameters())
    torch.manual_seed(5)
    traces = gradients.taylor_trace(model, data.images, model(data.images), data.labels, sigma=0.01, target="label")
    ceiling = traces.detach().sort().values[1:3].mean().item()
    term = AntiScoreMatching(weight=1, ceiling=ceiling, estimator="taylor", sigma=0.01, target="label")
    torch.manual_seed(5)
    found = torch.autograd.grad(term(Step(data, model)), parameters)
    below = -traces[traces < ceiling].sum() / 4
    assert (traces < ceiling).sum() == 2
    for ours, theirs in zip(found, torch.autograd.grad(below, parameters), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sigma", [0.0, -0.01])
def test_a_sigma_that_is_not_positive_is_an_error(sigma: float) -> None:
    with pytest.raises(UserError, match=r"sigma=.*: it should be greater than 0"):
        score(sigma=sigma)


def test_a_relu_network_is_refused() -> None:
    relu = VGG(name="t", layers=[4], width=1, channels=2, classes=CLASSES, dropout=None)
    with pytest.raises(UserError, match="vgg11_softplus"):
        score().check(relu)
    score().check(net())


class FunctionalReLU(nn.Sequential):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()  # type: ignore[no-any-return]


def test_a_hessian_that_is_exactly_zero_is_refused_at_the_first_step() -> None:
    """No module tells that a network calls functional.relu."""
    model = FunctionalReLU(nn.Flatten(), nn.Linear(32, CLASSES)).double()
    term = score(estimator="hutchinson")
    term.check(model)
    with pytest.raises(UserError, match=r"^ScoreMatching: the Hessian is exactly zero, .*vgg11_softplus$"):
        term(Step(batch(), model, differentiable_input=True))


def test_a_network_whose_last_layer_begins_at_zero_is_trained() -> None:
    model = layers.accelerate(net())
    for parameter in model.linear.parameters():
        nn.init.zeros_(parameter)
    assert not float(score(estimator="hutchinson")(Step(batch(), model, differentiable_input=True)))


def test_a_trace_needs_a_gradient_with_a_graph() -> None:
    images = batch().images
    with pytest.raises(UserError, match="compute it with differentiable=True"):
        gradients.hutchinson_trace(gradients.input_gradient(net(), images, 0), images, differentiable=False)


def test_the_trace_of_a_linear_network_is_zero() -> None:
    data, model = batch(), nn.Sequential(nn.Flatten(), nn.Linear(32, CLASSES)).double()
    at = slope_at(model, data.images, data.labels)
    assert not gradients.exact_trace(*at).any()
    assert not gradients.hutchinson_trace(*at, differentiable=True).any()


def test_dropout_between_the_two_passes_of_the_taylor_estimator_is_refused() -> None:
    """It would draw two masks, whose difference is multiplied by 2/sigma^2. One pass has one mask, and eval mode none."""
    model = VGG(name="t", layers=[4], width=1, channels=2, classes=CLASSES, dropout=0.5, activation=softplus).double()
    with pytest.raises(UserError, match=r"^ScoreMatching: .* two masks; set model\.dropout=null.*$"):
        score().check(model)
    with pytest.raises(UserError, match=r"^AntiScoreMatching: .* two masks; .*$"):
        AntiScoreMatching(weight=1, ceiling=1000, estimator="taylor", sigma=0.01, target="label").check(model)
    score(estimator="hutchinson").check(model)
    score(student_bn="running").check(model)
    values = []
    for probability in (0.5, 0.0):
        model.dropout.p = probability
        torch.manual_seed(3)
        values.append(score(student_bn="running")(Step(batch(), model, differentiable_input=True)))
    torch.testing.assert_close(*values)
    score().check(model)


# --- fooling ----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits whose input-gradients are given pictures."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures = pictures

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.pictures.flatten(1).T


def fooling(pictures: Tensor, mask: int = 2) -> float:
    data = batch(2)
    term = Fooling(weight=1, mask=mask, target="label", student_bn="batch")
    return term(Step(data, Linear(pictures), differentiable_input=True)).item()


def test_fooling_is_zero_for_the_mask_and_does_not_depend_on_scale() -> None:
    pictures = torch.zeros(CLASSES, 2, 4, 4, dtype=torch.float64)
    pictures[:, 0, :2, :2], pictures[:, 1, :2, :2] = -3.0, 1.0
    assert fooling(pictures) == pytest.approx(0, abs=1e-15)
    flat = torch.ones_like(pictures)
    assert fooling(flat) == pytest.approx(4 * (1 / 16 - 1 / 4) ** 2 + 12 / 16**2)
    assert fooling(-7 * flat) == pytest.approx(fooling(flat))


@pytest.mark.parametrize("target", ["label", "top"])
def test_fooling_is_equation_5_7_of_the_class_of_each_image(target: str) -> None:
    """Every class has a picture of its own; labels and predictions differ from each other and from image to image."""
    pictures = torch.randn(CLASSES, 2, 4, 4, dtype=torch.float64)
    images, classes = pictures.roll(1, 0), {"label": [1, 0, 1], "top": [2, 0, 1]}
    assert Linear(pictures)(images).argmax(1).tolist() == classes["top"]
    data = batch()._replace(images=images, labels=torch.tensor(classes["label"]))
    term = Fooling(weight=1, mask=2, target=target, student_bn="batch")
    found = term(Step(data, Linear(pictures), differentiable_input=True))
    mask, distances = torch.zeros(4, 4), []
    mask[:2, :2] = 1 / 4
    for label in classes[target]:
        size = pictures[label].abs().sum(0)
        distances.append((size / size.sum() - mask).square().sum())
    assert found.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-12)


def test_a_mask_larger_than_the_image_is_an_error() -> None:
    with pytest.raises(UserError, match="a side from 1 to 4"):
        fooling(torch.ones(CLASSES, 2, 4, 4, dtype=torch.float64), mask=5)
    assert corner(3, (4, 4)).sum() == 9
