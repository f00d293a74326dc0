"""Gradients and terms as mathematics: identities, finite differences, Monte-Carlo equality with noise."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import CLASSES, Quadratic, randomised
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch, TensorLoader, TrainingStream
from gradexp.data.sources import Split
from gradexp.engine.assemble import make_terms
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.run import Paths, Run
from gradexp.models.vgg import VGG
from gradexp.saliency import GradCAM, InputGradient, ReferenceFullGrad
from gradexp.tasks import train
from gradexp.terms import Activations, AntiScoreMatching, CrossEntropy, GradientNorm, Jacobian, ScoreMatching, SoftTargets, Step
from gradexp.terms.targets import Map, Targets
from gradexp.training.targets import StoredTargets


def net(seed: int) -> nn.Module:
    """A small VGG in float64 whose batch normalisation has random statistics, in eval mode."""
    torch.manual_seed(seed)
    model = VGG(name="tiny", layers=[4, "M", 5], width=1, channels=2, classes=CLASSES, dropout=None)
    return randomised(model)


def batch(count: int = 4) -> Batch:
    return tiny.batch(count, size=6)


def step(student: nn.Module, teacher: nn.Module | None = None, data: Batch | None = None) -> Step:
    targets = Targets(teacher, with_gradient=True) if teacher else None
    return Step(data or batch(), student, targets, differentiable_input=True)


def finite_difference(function: Callable[[Tensor], Tensor], point: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, entry by entry."""
    slope = torch.zeros_like(point).flatten()
    for i in range(point.numel()):
        shift = torch.zeros_like(point).flatten()
        shift[i] = epsilon
        shift = shift.view_as(point)
        slope[i] = (function(point + shift) - function(point - shift)) / (2 * epsilon)
    return slope.view_as(point)


@pytest.mark.parametrize("target", ["label", "top", "logprob"])
def test_input_gradient_is_the_slope(target: str) -> None:
    model, data = net(0), batch(2)
    gradient = gradients.input_gradient(model, data.images, data.labels, target=target)
    slope = finite_difference(lambda x: gradients.scalar(model(x), data.labels, target).sum().detach(), data.images)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def detached(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4]


PICTURES = torch.zeros(2, 2, 8, 8)
CALLS = [gradients.input_gradient, gradients.full_gradient, InputGradient(), GradCAM(), ReferenceFullGrad()]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PICTURES, torch.tensor([1]), r"labels have shape \(1,\): give one class, or one per image, \(2,\)"),
        (PICTURES, torch.tensor([0.0, 1.0]), "labels are torch.float32; give classes"),
        (PICTURES, torch.tensor([0, CLASSES]), f"no class {CLASSES}: the model has classes 0 to {CLASSES - 1}"),
        (PICTURES, "cat", "labels are a str; give one class"),
        (PICTURES.byte(), 0, r"images are torch.uint8, which has no gradients: give images.float\(\)"),
        (PICTURES.numpy(), 0, "images are a ndarray; give a tensor"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_told(call: Any, images: Any, labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(net(0).float().eval(), images, labels)


@pytest.mark.parametrize("call", [call for call in CALLS if not isinstance(call, GradCAM)])
def test_a_model_that_records_nothing_is_told(call: Any) -> None:
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.linear(detached(images))  # type: ignore[no-any-return]

    with pytest.raises(UserError, match="does not depend on the images by differentiable operations: look for no_grad, detach"):
        call(Probe().eval(), torch.randn(2, 3, 8, 8), 1)


def test_one_class_for_all_images() -> None:
    model, images = net(0).eval(), batch().images
    one = gradients.input_gradient(model, images, 2)
    assert torch.equal(one, gradients.input_gradient(model, images, torch.full((len(images),), 2)))
    assert torch.equal(one, gradients.input_gradient(model, images, torch.full((len(images),), 2, dtype=torch.int32)))


def test_all_stacks_the_gradient_of_every_logit() -> None:
    model, data = net(0), batch()
    jacobian = gradients.input_gradient(model, data.images, data.labels, target="all")
    assert jacobian.shape == (4, CLASSES, 2, 6, 6)
    for k in range(CLASSES):
        row = gradients.input_gradient(model, data.images, torch.full((4,), k))
        torch.testing.assert_close(jacobian[:, k], row)


def test_an_unknown_target_is_an_error_that_lists_the_targets() -> None:
    with pytest.raises(UserError, match=r"label, top, logprob$"):
        gradients.scalar(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), "loss")


def test_angle() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    second = torch.tensor([[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(gradients.angle(first, second), torch.tensor([0.0, 90.0, 180.0]), atol=1e-2, rtol=0)


def jacobian(**changes: str) -> Jacobian:
    options = {"reduction": "sum", "target": "label", "student_bn": "batch"}
    return Jacobian(weight=1, **{**options, **changes})


@pytest.mark.parametrize("student_bn", ["batch", "running"])
def test_parameter_gradient_of_the_jacobian_term(student_bn: str) -> None:
    """Double backward against finite differences, through batch statistics too."""
    teacher, data = net(1), batch()

    def loss(weight: Tensor) -> Tensor:
        student = copy.deepcopy(net(0)).train()
        parameters = {"features.conv2.weight": weight}
        module = _Patched(student, parameters)
        return jacobian(student_bn=student_bn)(step(module, teacher, data))

    weight = net(0).get_parameter("features.conv2.weight").detach().clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(weight), weight)
    slope = finite_difference(lambda w: loss(w).detach(), weight.detach(), epsilon=1e-5)
    torch.testing.assert_close(exact, slope, rtol=1e-5, atol=1e-6)


class _Patched(nn.Module):
    """A model with some parameters replaced by given tensors."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, parameters

    def forward(self, images: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.given, (images,))


def test_terms_vanish_for_a_student_that_is_its_teacher() -> None:
    same = step(net(0), net(0))
    assert Activations(weight=1, reduction="sum")(same).item() == 0
    assert jacobian()(same).item() == pytest.approx(0, abs=1e-25)


def test_activations_against_a_loop() -> None:
    student, teacher, data = net(0), net(1), batch()
    by_hand = sum(
        (student(data.images)[i, k] - teacher(data.images)[i, k]).item() ** 2 for i in range(4) for k in range(CLASSES)
    )
    assert Activations(weight=1, reduction="sum")(step(student, teacher)).item() == pytest.approx(by_hand / 4, rel=1e-6)
    assert Activations(weight=1, reduction="mean")(step(student, teacher)).item() == pytest.approx(by_hand / 12, rel=1e-6)


def test_cross_entropy_against_its_definition() -> None:
    data = batch()
    probability = net(0)(data.images).softmax(1)[torch.arange(4), data.labels]
    assert CrossEntropy(weight=1)(step(net(0))).item() == pytest.approx(-probability.log().mean().item(), rel=1e-6)


@pytest.mark.parametrize("temperature", [1, 4])
def test_soft_targets_against_their_definition(temperature: float) -> None:
    student, teacher, data = net(0), net(1), batch()
    softened = [(model(data.images) / temperature).exp() for model in (teacher, student)]
    p, q = (odds / odds.sum(1, keepdim=True) for odds in softened)
    by_hand = -sum((p[i, k] * q[i, k].log()).item() for i in range(4) for k in range(CLASSES)) * temperature**2 / 4
    assert SoftTargets(weight=1, temperature=temperature)(step(student, teacher)).item() == pytest.approx(by_hand, rel=1e-6)


def test_soft_targets_at_a_high_temperature_match_centred_logits() -> None:
    """Hinton et al. (2015, §2.1): the gradient tends to that of squared logits of mean 0, over 2K; so the factor is T²."""
    student, teacher, data = net(0), net(1), batch()
    logits = [model(data.images).detach() for model in (student, teacher)]
    logits[0].requires_grad_()
    centred = [one - one.mean(1, keepdim=True) for one in logits]
    matched = (centred[0] - centred[1]).square().sum(1).mean() / (2 * CLASSES)
    one = step(student, teacher)
    one._forwards["batch"] = (logits[0], {})
    found, expected = (
        torch.autograd.grad(loss, logits[0])[0] for loss in (SoftTargets(weight=1, temperature=1e5)(one), matched)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    with pytest.raises(UserError, match="temperature=0: it should be greater than 0"):
        SoftTargets(weight=1, temperature=0)


def test_jacobian_term_against_two_gradients() -> None:
    student, teacher, data = net(0), net(1), batch()
    pair = [gradients.input_gradient(model, data.images, data.labels) for model in (student, teacher)]
    expected = ((pair[0] - pair[1]) ** 2).sum() / 4
    assert jacobian()(step(student, teacher)).item() == pytest.approx(expected.item(), rel=1e-5)
    assert jacobian(reduction="mean")(step(student, teacher)).item() == pytest.approx(expected.item() / 72, rel=1e-5)
    distances = [(one - other).norm().item() for one, other in zip(*pair, strict=True)]
    assert jacobian(reduction="norm")(step(student, teacher)).item() == pytest.approx(sum(distances) / 4, rel=1e-5)


def test_the_norm_reduction_has_a_finite_gradient_at_zero() -> None:
    """The derivative of the square root is infinite there."""
    student = net(0)
    jacobian(reduction="norm")(step(student, copy.deepcopy(student).requires_grad_(False))).backward()
    slopes = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert slopes
    assert all(slope.isfinite().all() for slope in slopes)


def test_the_teachers_largest_logit_is_matched_in_both_networks() -> None:
    """§2.4.1: the class of the teacher's largest logit replaces the label; the student predicts another class here."""
    student, teacher, data = net(0), net(1), batch()
    teacher.get_parameter("linear.bias").data[1] += 5
    top = teacher(data.images).argmax(1)
    assert not (top == student(data.images).argmax(1)).any()
    pair = [gradients.input_gradient(model, data.images, top) for model in (student, teacher)]
    expected = ((pair[0] - pair[1]) ** 2).sum() / 4
    matching = step(student, teacher)
    assert jacobian(target="top")(matching).item() == pytest.approx(expected.item(), rel=1e-5)
    angle = matching.angle()
    assert angle is not None
    assert angle.item() == pytest.approx(gradients.angle(*pair).mean().item(), rel=1e-5)


def test_the_angle_is_between_gradients_that_terms_have_read() -> None:
    """Bias-gradients with batch statistics come with an input-gradient that no term reads."""
    student, teacher = net(0).train(), net(1)
    alone, beside = (Step(batch(), student, Targets(teacher, with_gradient=True), differentiable_input=True) for _ in range(2))
    beside.student_layer_gradients("label", "batch")
    angles = []
    for one in (alone, beside):
        jacobian(student_bn="running")(one)
        angles.append(one.angle())
    assert angles[0] == angles[1] is not None


def test_running_statistics_leave_the_student_as_it_was() -> None:
    student = net(0).train()
    before = copy.deepcopy(student.state_dict())
    jacobian(student_bn="running")(step(student, net(1)))
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_the_teacher_gets_no_gradients() -> None:
    student, teacher = net(0).train(), net(1)
    (jacobian()(step(student, teacher)) + Activations(weight=1, reduction="mean")(step(student, teacher))).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not teacher.training


def test_an_unknown_target_is_told_all_that_there_are() -> None:
    with pytest.raises(UserError, match="label, top, logprob or all"):
        gradients.input_gradient(net(0), batch().images, 0, target="logit")


def test_targets_without_gradients_say_so() -> None:
    with pytest.raises(UserError, match=r"make them with Targets\(..., with_gradient=True\)"):
        Targets(net(1), with_gradient=False).input_gradient(batch(), "label")


def test_a_step_needs_one_forward_pass_of_each_network() -> None:
    calls = {"student": 0, "teacher": 0}
    student, teacher = net(0).train(), net(1)
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    one = step(student, teacher)
    for term in (CrossEntropy(weight=1), Activations(weight=1, reduction="mean"), jacobian()):
        term(one)
    assert one.angle() is not None
    assert calls == {"student": 1, "teacher": 1}


# --- Propositions 1 and 2 ---------------------------------------------------------------------------------


def noisy_mean(loss: Callable[[Tensor], Tensor], images: Tensor, sigma: float, pairs: int) -> tuple[float, float]:
    """Mean and standard error of E loss(x + noise), over pairs of opposite Gaussian noise.

    loss: (N, B, ...) images -> (N,) batch means.
    """
    generator = torch.Generator().manual_seed(3)
    noise = sigma * torch.randn((pairs, *images.shape), dtype=images.dtype, generator=generator)
    values = (loss(images + noise) + loss(images - noise)) / 2
    return values.mean().item(), (values.std() / pairs**0.5).item()


def many(model: nn.Module, images: Tensor) -> Tensor:
    """(N, B, C, H, W) -> logits (N, B, K), as constants."""
    with torch.no_grad():
        return model(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def proposition_1(student: nn.Module, teacher: nn.Module, data: Batch, *, pairs: int) -> tuple[float, float, float]:
    """Increase of the squared error under input noise over sigma^2, with its standard error; the (full) Jacobian term."""
    sigma = 1e-4
    one = step(student, teacher, data)
    clean = Activations(weight=1, reduction="sum")(one).item()
    matched = jacobian(target="all", student_bn="batch")(one).item()

    def loss(images: Tensor) -> Tensor:
        return (many(teacher, images) - many(student, images)).square().sum(2).mean(1)

    mean, error = noisy_mean(loss, data.images, sigma, pairs=pairs)
    return (mean - clean) / sigma**2, error / sigma**2, matched


def test_proposition_1() -> None:
    """Squared error under input noise = activations + sigma^2 * (full) Jacobian term; exact for piecewise-linear nets."""
    added, error, matched = proposition_1(net(0), net(1), batch(2), pairs=4000)
    assert error < 0.05 * matched  # the interval is narrow enough to refute a wrong constant
    assert abs(added - matched) < 4 * error


def smooth_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def laplacians(function: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """The trace of the Hessian of each output of `function` at one image (1, C, H, W), (K,)."""
    hessian: Callable[[Tensor], Tensor] = torch.func.hessian(lambda x: function(x.view_as(image))[0])
    return hessian(image.flatten()).diagonal(dim1=1, dim2=2).sum(1).detach()


def test_proposition_1_drops_a_term_of_smooth_networks() -> None:
    """For smooth networks the remainder is O(sigma^2): it contains sigma^2 * sum (T - S) (trace of the Hessian of T - S)."""
    student, teacher, data = smooth_net(0), smooth_net(1), batch(1)

    def difference(images: Tensor) -> Tensor:
        return teacher(images) - student(images)

    dropped = (difference(data.images)[0] * laplacians(difference, data.images)).sum().item()
    added, error, matched = proposition_1(student, teacher, data, pairs=20_000)
    assert error < 0.02 * abs(dropped)
    assert abs(added - matched - dropped) < 4 * error
    assert abs(added - matched) > 20 * error  # as printed
    piecewise = laplacians(net(0), data.images)
    assert piecewise.abs().max() == 0


def test_proposition_2() -> None:
    """Squared error to fixed targets under input noise = squared error + sigma^2 * squared norm of the Jacobian."""
    student, data, sigma = net(0), batch(2), 1e-4
    truth = torch.randn(2, CLASSES, dtype=torch.float64)
    norm = GradientNorm(weight=1, reduction="sum", target="all", student_bn="batch")(step(student, data=data)).item()

    def loss(images: Tensor) -> Tensor:
        return (truth - many(student, images)).square().sum(2).mean(1)

    mean, error = noisy_mean(loss, data.images, sigma, pairs=4000)
    assert error < 0.05 * sigma**2 * norm
    assert abs(mean - loss(data.images[None]).item() - sigma**2 * norm) < 4 * error


def test_equation_2_3() -> None:
    """Cross-entropy under input noise = cross-entropy + sigma^2 / 2 * expected squared norm of the gradient of logprob.

    The thesis prints sigma^2, its derivation (§2.9) gives sigma^2 / 2. The step that drops the Hessian of the probability is
    exact for a piecewise-linear net whose targets are its own probabilities (Fisher's identity); these are taken here.
    """
    student, image, sigma = net(0), batch(1).images, 1e-4
    truth = student(image).softmax(1).detach()[0]
    term = GradientNorm(weight=1, reduction="sum", target="logprob", student_bn="batch")
    zero = torch.zeros(1, dtype=torch.long)
    norms = [term(step(student, data=Batch(image, zero + k, zero, zero))).item() for k in range(CLASSES)]
    penalty = sum(p * norm for p, norm in zip(truth.tolist(), norms, strict=True)) / 2

    def loss(images: Tensor) -> Tensor:
        return -(truth * many(student, images).log_softmax(2)).sum(2).mean(1)

    mean, error = noisy_mean(loss, image, sigma, pairs=4000)
    assert error < 0.05 * sigma**2 * penalty  # narrow enough to refute the constant that is printed
    assert abs(mean - loss(image[None]).item() - sigma**2 * penalty) < 4 * error


@pytest.mark.parametrize("make", [net, smooth_net])
def test_equation_2_2_drops_terms_of_its_own_order(make: Callable[[int], nn.Module]) -> None:
    """Soft targets under input noise = soft targets - sigma^2 * (sum ∇T·∇log S + dropped).

    dropped: half of sum T tr ∇² log S + log S tr ∇² T. The term that is printed is the smaller part, also for nets whose
    logits are piecewise linear.
    """
    student, teacher, data, sigma = make(0), make(1), batch(1), 1e-4
    clean = SoftTargets(weight=1, temperature=1)(step(student, teacher, data)).item()

    def log_student(images: Tensor) -> Tensor:
        return student(images).log_softmax(1)

    def soft_teacher(images: Tensor) -> Tensor:
        return teacher(images).softmax(1)

    slopes = [torch.autograd.functional.jacobian(f, data.images).view(CLASSES, -1) for f in (soft_teacher, log_student)]
    printed = (slopes[0] * slopes[1]).sum().item()
    values = [f(data.images)[0].detach() for f in (soft_teacher, log_student)]
    traces = [laplacians(f, data.images) for f in (soft_teacher, log_student)]
    dropped = (values[0] * traces[1] + values[1] * traces[0]).sum().item() / 2

    def loss(images: Tensor) -> Tensor:
        return -(many(teacher, images).softmax(2) * many(student, images).log_softmax(2)).sum(2).mean(1)

    mean, error = noisy_mean(loss, data.images, sigma, pairs=20_000)
    assert abs(printed) < abs(dropped)
    assert error < 0.05 * sigma**2 * abs(printed + dropped)
    assert abs(mean - clean + sigma**2 * (printed + dropped)) < 4 * error
    assert abs(mean - clean + sigma**2 * printed) > 20 * error  # as printed


def test_gradient_times_input_is_the_output_of_a_network_without_biases() -> None:
    """§2.3.2: f(x) = ∇f(x)·x where no layer has a bias; with batch normalisation in the limit of large inputs."""
    model, images = net(0), batch().images

    def product(images: Tensor) -> Tensor:
        slopes = gradients.input_gradient(model, images, batch().labels, target="all")
        return (slopes * images[:, None]).flatten(2).sum(2)

    assert not torch.allclose(model(images), product(images), rtol=0.1)
    torch.testing.assert_close(model(1e9 * images), product(1e9 * images), rtol=1e-6, atol=0)
    for module in model.modules():
        for name in ("bias", "running_mean"):
            if getattr(module, name, None) is not None:
                getattr(module, name).data.zero_()
    torch.testing.assert_close(model(images), product(images), rtol=1e-9, atol=1e-12)


# --- the trace of the Hessian -----------------------------------------------------------------------------


def test_taylor_trace_is_unbiased_on_quadratics_within_the_bound_on_its_variance() -> None:
    """§5.8: its variance exceeds Hutchinson's, 2 ||A||^2, by 4 ||grad f||^2 / sigma^2."""
    model, sigma, count = Quadratic(8), 0.1, 40_000
    image = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    images, labels = image.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.long)
    values = gradients.taylor_trace(model, images, model(images), labels, sigma=sigma, target="label")
    trace = model.matrix[0].trace()
    assert abs(values.mean() - trace) < 4 * values.std() / count**0.5
    slope = gradients.input_gradient(model, image, labels[:1]).square().sum()
    variance = 2 * model.matrix[0].square().sum() + 4 * slope / sigma**2
    assert values.var().item() == pytest.approx(variance.item(), rel=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_score_matching_is_equation_5_4(training: bool) -> None:
    """Eq. 5.4 with Eq. 5.9; in train mode both passes have batch statistics of their own."""
    model, data, sigma = net(0).train(training), batch(), 0.01
    everyone = torch.arange(len(data.labels))
    torch.manual_seed(4)
    noise = torch.randn_like(data.images)
    images = data.images.clone().requires_grad_()
    logit, noisy = (model(x)[everyone, data.labels] for x in (images, data.images + sigma * noise))
    trace = 2 / sigma**2 * (noisy - logit)
    norm = torch.autograd.grad(logit.sum(), images)[0].square().sum((1, 2, 3))
    torch.manual_seed(4)
    value = ScoreMatching(weight=1, stability=1e-4, estimator="taylor", sigma=sigma, target="label")(step(model, data=data))
    torch.testing.assert_close(value, (trace + norm / 2 + 1e-4 * trace**2).mean())


def test_anti_score_matching_saturates_image_by_image() -> None:
    model, data = net(0), batch()
    torch.manual_seed(4)
    trace = gradients.taylor_trace(model, data.images, model(data.images), data.labels, sigma=0.01, target="label").detach()
    ceiling = trace.median().item()
    torch.manual_seed(4)
    value = AntiScoreMatching(weight=1, ceiling=ceiling, estimator="taylor", sigma=0.01, target="label")(step(model, data=data))
    torch.testing.assert_close(value.detach(), -trace.clamp(max=ceiling).mean())
    low = AntiScoreMatching(weight=1, ceiling=trace.min().item() - 1, estimator="taylor", sigma=1e-9, target="label")
    torch.manual_seed(4)
    low.ceiling = -1e12
    value = low(step(model, data=data))
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(value, list(model.parameters())))


# --- stored targets ---------------------------------------------------------------------------------------


LAYER = "features.norm1"
MAPS = [Map("attention", LAYER), Map("absolute", LAYER), Map("gradient", LAYER, "label")]


def stored(
    folder: Path, teacher: nn.Module, maps: list[Map] = MAPS, *, count: int = 10, steps: int = 12, **changes: Any
) -> tuple[TensorLoader, Targets, StoredTargets]:
    images = np.random.default_rng(0).integers(0, 256, (count, 2, 6, 6), dtype=np.uint8)
    statistics = {"mean": torch.full((2,), 0.5), "std": torch.full((2,), 0.3)}
    options = {"batch_size": 4, "shuffle": True, "flip": True, "crop": 1, **changes}
    loader = TensorLoader(Split(images, np.arange(count) % CLASSES), np.arange(count), **statistics, **options)
    live = Targets(teacher.float(), with_gradient=True, layers=[LAYER])
    return loader, live, StoredTargets(live, loader, steps, folder, target="label", maps=maps)


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, 40),
        ({"steps": 2}, 8),
        ({"steps": 5}, 18),
        ({"count": 9}, 54),
        ({"count": 9, "steps": 3}, 13),
        ({"flip": False, "crop": 0, "steps": 5}, 18),
        ({"shuffle": False}, 40),
    ],
    ids=str,
)
def test_stored_targets_are_the_live_ones(tmp_path: Path, changes: dict[str, Any], images: int) -> None:
    """Also where a training ends within a pass, and where a lone image joins the batch before it."""
    loader, live, kept = stored(tmp_path / "targets", net(1), **changes)
    seen = 0
    for batch in TrainingStream(loader, changes.get("steps", 12)):
        torch.testing.assert_close(kept.logits(batch), live.logits(batch), rtol=1e-5, atol=1e-5)
        gradient = live.input_gradient(batch, "label")
        torch.testing.assert_close(kept.input_gradient(batch, "label").float(), gradient, rtol=2**-8, atol=1e-6)
        for wanted in MAPS:
            torch.testing.assert_close(kept.map(batch, wanted).float(), live.map(batch, wanted), rtol=2**-8, atol=1e-5)
        seen += len(batch.row)
    assert seen == images
    assert len(kept.keys) <= seen


def test_targets_that_are_not_stored_are_an_error(tmp_path: Path) -> None:
    """And not those of the next view, or of the last one."""
    loader, _, kept = stored(tmp_path / "targets", net(1), steps=1)
    rows, views = kept.keys // loader.views, kept.keys % loader.views
    for other in (rows, views + 1), (rows, views - 1), (rows[-1:], views[-1:] + 1), (rows + loader.count, views):
        batch = loader.batch(rows[: len(other[0])], views[: len(other[0])])._replace(row=other[0], view=other[1])
        for read in (kept.logits, partial(kept.input_gradient, target="label"), partial(kept.map, wanted=MAPS[0])):
            with pytest.raises(RuntimeError, match="targets has no teacher targets"):
                read(batch)


def test_stored_targets_have_the_precision_of_the_steps(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed under autocast where the steps are, and each precision has a folder of its own."""
    config = compose_run(["experiment=jacobian_distill", "method=ce_a_j", *places])
    images, half = np.random.default_rng(0).integers(0, 256, (10, 2, 6, 6), dtype=np.uint8), torch.full((2,), 0.5)
    loader = TensorLoader(Split(images, np.arange(10) % CLASSES), np.arange(10), batch_size=5, mean=half, std=half)
    teacher, batch = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES)), next(iter(loader))
    monkeypatch.setattr(train, "_load_teacher", lambda *_: teacher)
    finished: Any = SimpleNamespace(run=SimpleNamespace(id="0" * 12), digest="1" * 64)
    folders = set[Path]()
    for precision in ("32", "bf16"):
        contexts = [torch.autocast("cpu", torch.bfloat16, enabled=precision == name) for name in ("bf16", "32")]
        hardware: Any = SimpleNamespace(store_gib=1, precision=precision, autocast=lambda contexts=contexts: contexts[0])
        parts = build(config["optim"], where="optim"), loader, hardware
        module = train.make_module(Run(config, Paths.of(config)), {"teacher": finished}, teacher, make_terms(config), *parts)
        assert isinstance(module.targets, StoredTargets)
        distances = []
        for context in contexts:  # that of the steps, and the other one
            with context:
                distances.append((module.targets.logits(batch) - Targets(teacher, with_gradient=False).logits(batch)).norm())
        assert distances[0] < 0.1 * distances[1]
        folders.add(module.targets.folder)
    assert len(folders) == 2


def test_stored_targets_are_computed_once_and_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        stored(tmp_path / "targets", net(1))
    assert capsys.readouterr().out.count("computing") == 1


def test_interrupted_computation_of_targets_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradexp.training.targets.CHUNK", 4)
    whole = stored(tmp_path / "whole", net(1))[2]
    folder = tmp_path / "cut"
    stored(folder, net(1))
    for name in whole.stored:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        (folder / name).write_bytes(content)
        sums = folder / f"{name}.crc"
        sums.write_text(json.dumps(json.loads(sums.read_text())[:3]))
    again = stored(folder, net(1))[2]
    maps = [f"attention-{LAYER}", f"absolute-{LAYER}", f"gradient-{LAYER}-label"]
    assert list(whole.stored) == ["logits", "gradient-label", *maps]
    for name, values in whole.stored.items():
        assert torch.equal(again.stored[name], values), name


def test_another_method_adds_its_quantities_to_the_same_folder(tmp_path: Path) -> None:
    before = stored(tmp_path / "targets", net(1), maps=[])[2]
    assert list(before.stored) == ["logits", "gradient-label"]
    sums = tmp_path / "targets" / "logits.crc"
    written = sums.stat().st_mtime_ns
    after = stored(tmp_path / "targets", net(1))[2]
    assert sums.stat().st_mtime_ns == written, "the logits were computed again"
    assert torch.equal(after.stored["logits"], before.stored["logits"])
    assert len(after.stored) == 2 + len(MAPS)


def test_damaged_targets_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also outside the values that are compared with the teacher's."""
    kept = stored(tmp_path / "targets", net(1))[2].stored
    whole = kept["logits"].clone()
    kept["logits"][len(whole) // 2] = 7
    assert torch.equal(stored(tmp_path / "targets", net(1))[2].stored["logits"], whole)
    assert "logits is damaged" in capsys.readouterr().out


def test_stored_targets_of_another_teacher_are_refused(tmp_path: Path) -> None:
    stored(tmp_path / "targets", net(1))
    with pytest.raises(UserError, match="delete that folder"):
        stored(tmp_path / "targets", net(2))


def test_stored_targets_that_are_nan_are_refused(tmp_path: Path) -> None:
    _, live, kept = stored(tmp_path / "targets", net(1))
    kept.compute["logits"] = lambda batch: live.logits(batch) * torch.nan
    with pytest.raises(UserError, match="delete that folder"):
        kept._check()
