"""Chapter 5 from training to figure: what the tasks measure, and the mistakes that they name."""

import copy
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_run, upstream_of
from test_score_matching import batch, net
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.engine.assemble import load_model, make_data, make_hardware
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import ensure, finish
from gradexp.engine.evaluation import Evaluation
from gradexp.engine.record import read_arrays, write_arrays, write_record
from gradexp.engine.run import Paths, Run, run_id
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.evaluate.discriminative_perturbation import accuracies, count_correct, saliency
from gradexp.evaluate.score_objective import objective, objective_parts
from gradexp.evaluate.shift import Shifted, shift_effects, sine_effects
from gradexp.report import figures, specs
from gradexp.report.draw.lines import panels
from gradexp.report.draw.pictures import fooling, red_over, samples, shift, signed
from gradexp.training.classifier import Classifier

pytestmark = pytest.mark.usefixtures("sample_records")

TINY = ["scale=quick", "trainer.threads=1", "logger=none"]
SMALL = {"model.width": 1 / 64, "data.per_class": 4, "optim.passes": 1}
OF_IMAGES = ("density_ratio", "discriminative_pixel_perturbation", "fooling", "score_objective")


def shrunk(*names: str) -> list[str]:
    """Overrides that make upstream trainings tiny."""
    return [f"++upstream.{name}.{key}={value}" for name in names for key, value in SMALL.items()]


def run(places: list[str], *words: str) -> Run:
    images = ["task.images=40"] if words[0].removeprefix("experiment=") in OF_IMAGES else []
    config = compose_run([words[0], *images, *words[1:], *TINY, *places])
    return Run(config, Paths.of(config))


def done(places: list[str], *words: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    made = run(places, *words)
    record = ensure(made)
    return record, read_arrays(made.record_path) if "arrays" in record else {}


TRAIN = ["experiment=score_matching", *(f"{key}={value}" for key, value in SMALL.items())]
MODEL_AND_JUDGE = [*shrunk("model", "judge"), "task.samples=12", "task.sampling.steps=2"]


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ce", "half_gradient_norm", "score_matching", "anti_score_matching"])
def test_the_four_regularisers_train(places: list[str], method: str) -> None:
    record, _ = done(places, *TRAIN, f"method={method}")
    metrics = record["metrics"]
    assert record["status"] == "finished"
    assert len(metrics["train/loss"]) == 1
    seen = {name: metrics[name][0] for name in metrics if name.startswith(("train/hessian", "train/gradient"))}
    if method == "score_matching":  # the loss is made of what is recorded of its parts: Eq. 5.4
        trace, squared, norm = (
            seen[f"train/{name}"] for name in ("hessian_trace", "hessian_trace/squared", "gradient_norm/squared")
        )
        assert metrics["train/loss/score_matching"][0] == pytest.approx(1e-3 * (trace + norm / 2 + 1e-4 * squared), rel=1e-3)
    elif method == "anti_score_matching":
        assert 0 <= seen["train/hessian_trace/at_ceiling"] <= 1
        assert seen["train/hessian_trace/squared"] >= seen["train/hessian_trace"] ** 2
    else:
        assert not seen


def test_all_models_are_trained_in_float32_and_records_say_so(places: list[str]) -> None:
    """Terms on the Hessian need it, so models that are compared with theirs use it too, on every processor."""
    experiments = ["score_matching", "gan_test", "density_ratio", "discriminative_pixel_perturbation", "implicit_samples"]
    for name in [*experiments, "fooling", "shift"]:
        assert compose_run([f"experiment={name}"])["trainer"]["precision"] == 32, name
    tried = [f"method={name}" for name in ("score_matching", "anti_score_matching")]
    assert [done(places, *TRAIN, word, "trainer.precision=auto")[0]["precision"] for word in tried] == ["32", "32"]


def test_the_hutchinson_estimator_trains_too(places: list[str]) -> None:
    record, _ = done(places, *TRAIN, "method.terms.score_matching.estimator=hutchinson")
    assert np.isfinite(record["metrics"]["train/loss/score_matching"]).all()


def test_a_relu_network_is_refused_where_a_term_needs_its_hessian(places: list[str]) -> None:
    with pytest.raises(UserError, match="vgg11_softplus"):
        ensure(run(places, *TRAIN, "model=vgg11"))


def test_a_diverged_training_keeps_its_curve_and_its_gan_test_is_nan(places: list[str]) -> None:
    words = ["experiment=gan_test", *MODEL_AND_JUDGE, "upstream.model.method.choice=score_matching"]
    words += ["+upstream.model.method.terms.score_matching.weight=1e30", "upstream.model.optim.passes=4"]
    made = run(places, *words)
    record = ensure(made)
    assert record["status"] == "diverged"
    assert record["metrics"]["gan_test"] is None  # JSON has no NaN
    assert record["metrics"]["judge/accuracy"] > 0  # the judge is sound
    trained = made.upstream["model"].record()
    assert trained is not None
    assert trained["status"] == "diverged"
    assert 1 <= len(trained["metrics"]["train/loss"]) <= 4
    assert trained["metrics"]["train/loss"][-1] is None


@pytest.mark.parametrize(
    ("experiment", "axis", "curve"),
    [("density_ratio", "sigma", "density_ratio/log"), ("discriminative_pixel_perturbation", "removed", "accuracy")],
)
def test_curves_of_a_diverged_model_are_nan_over_the_axis_that_was_asked(
    places: list[str], experiment: str, axis: str, curve: str
) -> None:
    names = ("model",) if experiment == "density_ratio" else ("model", "explainer")
    healthy, _ = done(places, f"experiment={experiment}", *shrunk(*names))
    diverging = [
        word
        for name in names
        for word in (
            f"upstream.{name}.method.choice=score_matching",
            f"+upstream.{name}.method.terms.score_matching.weight=1e30",
            f"upstream.{name}.optim.passes=4",
        )
    ]
    diverged, _ = done(places, f"experiment={experiment}", *shrunk(*names), *diverging)
    assert (healthy["status"], diverged["status"]) == ("finished", "diverged")
    assert diverged["metrics"][axis] == healthy["metrics"][axis]
    assert diverged["metrics"][curve] == [None] * len(healthy["metrics"][curve])


# --- looking at models ------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """Logit k rests on one red pixel of the first row, number `places[k]`."""

    def __init__(self, *places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, images: Tensor) -> Tensor:
        return 100 * images[:, 0, 0, self.places]


def test_the_judge_tells_what_samples_of_the_model_show(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of class k have a white pixel k, which this judge takes for another class from 5 on: 7 of 12 are recognised."""
    networks = {"model": Pixels(*range(10)).eval(), "judge": Pixels(0, 1, 2, 3, 4, 6, 7, 8, 9, 5).eval()}
    monkeypatch.setattr(Evaluation, "model", lambda _, name, **__: networks[name])
    record, _ = done(places, "experiment=gan_test", *MODEL_AND_JUDGE)
    assert record["metrics"]["gan_test"] == pytest.approx(100 * 7 / 12, abs=1e-3)


def test_gan_test_records_its_interval_and_leaves_no_samples(places: list[str]) -> None:
    made = run(places, "experiment=gan_test", *MODEL_AND_JUDGE)
    metrics = ensure(made)["metrics"]
    assert metrics["gan_test/low"] <= metrics["gan_test"] <= metrics["gan_test/high"]
    assert {"model/accuracy", "judge/accuracy"} <= metrics.keys()
    assert 0 < metrics["samples/high_frequency"] < 100
    assert not made.pieces.exists()


def test_interrupted_sampling_continues(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gradexp.tasks import gan_test

    words = ["experiment=gan_test", *MODEL_AND_JUDGE]
    monkeypatch.setattr(gan_test, "SAMPLED", 5)
    whole = ensure(run([f"{place}/0" for place in places], *words))
    again = run([f"{place}/1" for place in places], *words)
    seen: list[int] = []
    climb = gan_test.Ascent.climb

    def interrupt(self: Any, model: Any, images: Tensor, *rest: Any) -> Tensor:
        seen.append(len(images))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return climb(self, model, images, *rest)

    monkeypatch.setattr(gan_test.Ascent, "climb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure(again)
    assert ensure(again)["metrics"] == whole["metrics"]
    assert seen == [5, 5, 5, 2]


def test_samples_of_other_weights_are_not_reused(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gradexp.tasks import gan_test

    made = run(places, "experiment=gan_test", *MODEL_AND_JUDGE)
    with monkeypatch.context() as patch:
        patch.setattr(gan_test.gan_test, "gan_test", lambda *_, **__: 1 / 0)  # all samples are there
        with pytest.raises(ZeroDivisionError):
            ensure(made)
    (kept,) = made.pieces.glob("*/samples_0.pt")
    kept.parent.rename(made.pieces / "0123456789ab")
    seen: list[int] = []
    climb = gan_test.Ascent.climb
    monkeypatch.setattr(gan_test.Ascent, "climb", lambda *args: seen.append(1) or climb(*args))
    assert np.isfinite(ensure(made)["metrics"]["gan_test"])
    assert seen
    assert not made.pieces.exists()


@pytest.mark.parametrize(
    ("experiment", "words", "place", "size"),
    [
        (
            "implicit_samples",
            ["task.sampling.steps=2", "task.denoising.steps=2", "task.images=20"],
            "gradexp.sampling.Ascent.denoise",
            "gradexp.tasks.implicit_samples.DENOISED",
        ),
        (
            "discriminative_pixel_perturbation",
            [*shrunk("explainer"), "task.images=20"],
            "gradexp.evaluate.discriminative_perturbation.count_correct",
            "gradexp.tasks.discriminative_perturbation.BATCH",
        ),
    ],
)
def test_interrupted_evaluations_continue(
    experiment: str, words: list[str], place: str, size: str, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third of its three pieces: the first two are not done again, and the numbers are those of an undisturbed run."""
    monkeypatch.setattr(size, 7)
    words = [f"experiment={experiment}", *shrunk("model"), *words]
    whole = ensure(run([f"{place}/0" for place in places], *words))
    again, seen = run([f"{place}/1" for place in places], *words), []
    work = resolve_name(place)

    def interrupt(*args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return work(*args, **options)

    monkeypatch.setattr(place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure(again)
    resumed = ensure(again)
    assert len(seen) == 4
    assert resumed["metrics"] == whole["metrics"]
    assert "attempts" not in resumed  # by the same code, on the same machine


def test_the_objective_is_recorded_with_its_error(places: list[str]) -> None:
    """Of the run's own images and model, in batches; NaN for a model that diverged."""
    made = run(places, "experiment=score_objective", *shrunk("model"), "task.images=200", "task.draws=2")
    record = ensure(made)
    metrics = record["metrics"]
    assert record["images"] == 200
    assert metrics["objective"] == pytest.approx(metrics["trace"] + metrics["half_gradient_norm"], rel=1e-4)
    look = Evaluation(made, upstream_of(made))
    model, rows = look.model("model"), look.rows(200, 128)
    parts = [objective_parts(model, look.batch(some), draws=2, sigma=0.01, seed=i) for i, some in enumerate(rows)]
    expected = objective(torch.cat(parts))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3)
    assert 0 < metrics["gradient/high_frequency"] < 100
    weight = "+upstream.model.method.terms.score_matching.weight=1e30"
    diverging = ["upstream.model.method.choice=score_matching", weight, "upstream.model.optim.passes=4"]
    lost, _ = done(places, "experiment=score_objective", *shrunk("model"), *diverging, "task.draws=2")
    assert (lost["status"], lost["metrics"]["objective"]) == ("diverged", None)


def test_statistics_estimated_again_are_those_of_clean_training_images(places: list[str]) -> None:
    """The evaluated network is that of train mode on these images, and its accuracy is measured again."""
    words = ["experiment=gan_test", *MODEL_AND_JUDGE]
    made = run(places, *words, "task.statistics=20")
    metrics = ensure(made)["metrics"]
    look = Evaluation(made, upstream_of(made))
    model, images = look.model("model", clean=20), torch.cat(list(look._clean_images(20)))
    torch.testing.assert_close(copy.deepcopy(model).train()(images), model(images), rtol=1e-3, atol=1e-3)
    everything = look.data.train_loader(batch_size=1, device="cpu", augment=False)
    known = {image.numpy().tobytes() for image in everything.batch(*[torch.arange(everything.count)] * 2).images}
    assert {image.contiguous().numpy().tobytes() for image in images} <= known
    assert len(images) == 20
    assert metrics["model/accuracy"] == pytest.approx(accuracy_on_test(model, look.data, look.hardware.device), rel=1e-5)
    assert run_id(run(places, *words, "task.statistics=null").config) == run_id(run(places, *words).config) != made.id
    with pytest.raises(UserError, match=r"task\.statistics=1: it should be greater than or equal to 2"):
        ensure(run(places, *words, "task.statistics=1"))


def test_a_judge_that_is_the_sampled_model_is_an_error(places: list[str]) -> None:
    words = ["experiment=gan_test", *MODEL_AND_JUDGE, "upstream.judge.model.choice=resnet18"]
    with pytest.raises(UserError, match="the sampled model itself"):
        ensure(run(places, *words, "upstream.judge.model.width=0.015625", "seed=0"))


def test_sampling_needs_pixels_from_0_to_1(places: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.normalise=none"):
        both = [f"+upstream.{name}.data.normalise=standard" for name in ("model", "judge")]
        ensure(run(places, "experiment=gan_test", *MODEL_AND_JUDGE, "data.normalise=standard", *both))


def test_implicit_samples(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images are shown; the errors are those of all that were denoised, however they are batched."""
    short = [*shrunk("model"), "task.sampling.steps=2", "task.denoising.steps=2", "task.images=40"]
    record, arrays = done([f"{place}/0" for place in places], "experiment=implicit_samples", *short)
    assert {name: array.shape for name, array in arrays.items() if name != "labels"} == dict.fromkeys(
        ("samples", "images", "noisy", "denoised"), (10, 3, 32, 32)
    )
    metrics = record["metrics"]
    assert metrics["error/noisy"] == pytest.approx(0.07, abs=0.03)  # half of a dark image's noise is clipped
    assert metrics["images/high_frequency"] < metrics["noisy/high_frequency"]
    pixels = {name: arrays[name].astype(float) / 255 for name in ("images", "noisy", "denoised")}
    assert np.sqrt(((pixels["noisy"] - pixels["images"]) ** 2).mean()) == pytest.approx(metrics["error/noisy"], rel=0.1)
    monkeypatch.setattr("gradexp.tasks.implicit_samples.DENOISED", 7)
    again, others = done([f"{place}/1" for place in places], "experiment=implicit_samples", *short, "task.shown=5")
    assert len(others["denoised"]) == 5
    assert np.abs(others["noisy"].astype(int) - arrays["noisy"][:5]).max() <= 1
    assert {name: again["metrics"][name] for name in metrics} == pytest.approx(metrics, rel=1e-3)
    short[-1] = "task.images=10"
    fewer, _ = done([f"{place}/1" for place in places], "experiment=implicit_samples", *short)
    assert fewer["metrics"]["error/noisy"] != pytest.approx(metrics["error/noisy"], rel=1e-4)


def test_fooling_moves_the_energy_into_the_mask(places: list[str]) -> None:
    words = [*shrunk("start"), "model.width=0.015625", "data.per_class=4", "optim.passes=40"]
    record, arrays = done(
        places, "experiment=fooling", *words, "optim.optimizer.lr=0.01", "method.terms.cross_entropy.weight=0.1"
    )
    metrics = record["metrics"]
    assert metrics["energy/uniform"] == pytest.approx(100 * 225 / 1024, rel=1e-4)
    assert metrics["energy/logit/after"] > metrics["energy/logit/before"] + 1
    assert {"test/accuracy", "test/accuracy/before", "energy/loss/after", "energy/loss@T=1000/after"} <= metrics.keys()
    assert arrays["logit_after"].sum((1, 2)) == pytest.approx([1] * 4, rel=1e-3)


def test_the_control_of_figure_5_5_is_measured_in_the_same_mask(places: list[str]) -> None:
    """The control has weight 0; the energy is that inside the task's mask."""
    words = [*shrunk("start"), "model.width=0.015625", "data.per_class=4", "optim.passes=1"]
    control = [*words, "method.terms.fooling.weight=0"]
    record, _ = done(places, "experiment=fooling", *control)
    smaller, _ = done(places, "experiment=fooling", *control, "task.mask=8")
    assert "train/loss/fooling" not in record["metrics"]
    assert record["metrics"]["energy/uniform"] == pytest.approx(100 * 225 / 1024, rel=1e-4)
    assert smaller["metrics"]["energy/uniform"] == pytest.approx(100 * 64 / 1024, rel=1e-4)
    assert smaller["metrics"]["energy/logit/after"] < record["metrics"]["energy/logit/after"]
    assert {"test/accuracy", "energy/logit/after"} <= record["metrics"].keys()


def test_fooling_compares_accuracies_on_the_same_images(places: list[str]) -> None:
    """Measured by the run itself: another start may have been tested on other images."""
    words = [*shrunk("start"), "model.width=0.015625", "optim.passes=1", "data.validation=0.3"]
    made = run(places, "experiment=fooling", *words)
    metrics = ensure(made)["metrics"]
    hardware, data = make_hardware(made.config), make_data(made)
    assert data.validation == 0.3
    start = load_model(finish(made.upstream["start"]), hardware)
    assert not start.training
    assert not any(parameter.requires_grad for parameter in start.parameters())
    assert metrics["validation/accuracy/before"] == pytest.approx(accuracy_on_test(start, data, hardware.device), rel=1e-5)


def test_a_failed_measurement_does_not_repeat_the_fine_tuning(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gradexp.tasks import fool

    words = [*shrunk("start"), "model.width=0.015625", "data.per_class=4", "optim.passes=2"]
    made = run(places, "experiment=fooling", *words, "trainer.checkpoint_every=0")
    steps: list[int] = []
    step = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", lambda *args: steps.append(1) or step(*args))  # type: ignore[func-returns-value]
    with monkeypatch.context() as lost:
        lost.setattr(fool, "maps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ensure(made)
    whole = len(steps)
    assert ensure(made)["status"] == "finished"
    assert len(steps) == whole
    assert not list(made.folder.glob("*.ckpt*"))


def test_a_fine_tuning_that_diverged_keeps_what_was_measured_before_it(places: list[str]) -> None:
    words = [*shrunk("start"), "model.width=0.015625", "data.per_class=4", "optim.passes=4"]
    record, _ = done(places, "experiment=fooling", *words, "method.terms.fooling.weight=1e38")
    assert record["status"] == "diverged"
    found = {name: value for name, value in record["metrics"].items() if name.startswith(("energy/", "test/accuracy"))}
    assert {name for name, value in found.items() if value is None} == {
        "test/accuracy", "energy/logit/after", "energy/loss/after", "energy/loss@T=1000/after", "energy/common/after"
    }  # fmt: skip
    assert len(found) == 11
    assert record["metrics"]["common/after"] is None


@pytest.mark.parametrize(
    ("experiment", "wrong", "message"),
    [
        ("gan_test", "task.sampling.start=[0.5,-0.2]", "greater than or equal to 0"),
        ("implicit_samples", "task.denoising.noise=-1", "greater than or equal to 0"),
        ("density_ratio", "task.sigmas=[0,-0.1]", "greater than or equal to 0"),
        ("discriminative_pixel_perturbation", "task.saliency=std", "channel_std or magnitude"),
        ("discriminative_pixel_perturbation", "task.target=second", "top or label"),
        ("discriminative_pixel_perturbation", "task.replacement=mean", "image_mean, imputed or a number"),
        ("discriminative_pixel_perturbation", "task.fractions.to=2", "less than or equal to 1"),
    ],
)
def test_wrong_settings_of_evaluations_are_errors_before_training(
    places: list[str], tmp_path: Path, experiment: str, wrong: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ensure(run(places, f"experiment={experiment}", wrong))
    assert not list(tmp_path.rglob("*.json"))


def test_the_other_activation_of_resnet18_is_refused_where_a_hessian_is_asked(places: list[str]) -> None:
    """Typed as conf/model/resnet18.yaml says."""
    typed = ["~model.activation.beta", "model.activation._target_=torch.nn.ReLU"]
    with pytest.raises(UserError, match="take a softplus network"):
        ensure(run(places, *TRAIN, *typed))
    assert done(places, *TRAIN, *typed, "method=ce")[0]["status"] == "finished"


def test_a_start_of_another_model_fails_before_it_is_trained(places: list[str], tmp_path: Path) -> None:
    """The fooled model hands its width down; a start that is set apart is another matter."""
    words = [*shrunk("start"), "model.width=0.03125", "upstream.start.model.width=0.0625"]
    with pytest.raises(UserError, match=r"weights of upstream\.start do not fit the model \(.*size mismatch"):
        ensure(run(places, "experiment=fooling", *words))
    assert not list(tmp_path.rglob("*.pt"))


def test_a_mask_that_does_not_fit_fails_before_the_training(places: list[str], tmp_path: Path) -> None:
    small = [*shrunk("start"), "model.width=0.015625"]
    with pytest.raises(UserError, match="a side from 1 to 32"):
        ensure(run(places, "experiment=fooling", *small, "task.mask=33"))
    with pytest.raises(UserError, match=r"set task\.mask alone"):
        ensure(run(places, "experiment=fooling", *small, "method.terms.fooling.mask=8"))
    assert not list(tmp_path.rglob("*.pt"))


# --- perturbation and shift as mathematics ----------------------------------------------------------------


class Corners(nn.Module):
    """Class 0 lives in the top row of the image, class 1 in the bottom row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 0].sum(1) + 0.1 * x[:, 1, 0].sum(1), x[:, 0, -1].sum(1)], dim=1)


def test_removing_what_does_not_matter_keeps_the_accuracy() -> None:
    """A quarter of the pixels, the top row, matters to the logit of class 0: the accuracy falls when that row goes."""
    images = torch.zeros(6, 2, 4, 4)
    images[:, :, 0], images[:, 0, -1] = 1.0, 0.6
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    data = Batch(images, labels, labels, labels)
    how = {"kind": "magnitude", "target": "top", "replacement": 0.0, "seed": 0}
    fractions = [0, 0.75, 1]
    counts = count_correct(Corners(), Corners(), data, fractions=fractions, **how)  # type: ignore[arg-type]
    found = accuracies(fractions, counts + counts)
    assert found["accuracy"] == pytest.approx([500 / 6, 500 / 6, 500 / 6])  # black images: the first class wins the tie
    how["replacement"] = "image_mean"
    shifted = Shifted(Corners(), torch.zeros(2, 4, 4), amplitude=0.0)
    same = count_correct(shifted, Corners(), data, fractions=[0.75], **how)  # type: ignore[arg-type]
    assert accuracies([0.75], same)["accuracy/correct"] == [100.0]


class Wrong(nn.Module):
    """An explainer by which the top row does not matter."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 0, 1:].sum((1, 2)), x[:, 0, 1:].sum((1, 2))], dim=1)


def test_a_bad_explainer_removes_what_matters() -> None:
    images = torch.zeros(4, 2, 4, 4)
    images[:, :, 0], images[:, 0, -1] = 1.0, 0.6
    data = Batch(images, *[torch.zeros(4, dtype=torch.long)] * 3)
    how = {"kind": "magnitude", "target": "label", "replacement": 0.0, "seed": 0, "fractions": [0.25]}
    good, bad = (count_correct(Corners(), by, data, **how).tolist() for by in (Corners(), Wrong()))  # type: ignore[arg-type]
    assert (good, bad) == ([[4, 4], [4, 4]], [[0, 0], [4, 4]])


def test_the_explained_class_is_the_one_that_the_perturbed_model_predicts() -> None:
    """`top` is not the explainer's own prediction, nor the label, where the three differ."""
    images = torch.rand(2, 1, 4, 4) + 0.1
    slopes = torch.zeros(3, 16)
    slopes[0, 0], slopes[1, 5], slopes[2, 10] = 1.0, 1.0, 1.0  # the pixel on which each logit rests
    perturbed, explainer, label = 1, 2, 0

    class Rows(nn.Module):
        """Logits that rest on one pixel each, and a constant that decides the prediction."""

        def __init__(self, predicted: int) -> None:
            super().__init__()
            self.lead = 10 * torch.eye(3)[predicted]

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ slopes.T + self.lead

    seen: list[Tensor] = []

    class Watched(Rows):
        """Notes the images that it is asked about."""

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    data = Batch(images, *[torch.full((2,), label)] * 3)
    for target, kept in (("top", 5), ("label", 0)):
        seen.clear()
        how = {"kind": "magnitude", "target": target, "replacement": 0.0, "seed": 0, "fractions": [15 / 16]}
        count_correct(Watched(perturbed), Rows(explainer), data, **how)  # type: ignore[arg-type]
        left = seen[-1].flatten(1).nonzero()  # all pixels went but the one that the explained logit rests on
        assert left[:, 1].tolist() == [kept, kept]


def test_pixels_are_removed_by_the_explainer_and_judged_by_the_model(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two linear networks: the record against a loop over images and pixels, and the gallery's gradients."""
    slopes = {name: torch.randn(10, 3 * 32 * 32) for name in ("model", "explainer")}

    class Linear(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.slopes = slopes[name]

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ self.slopes.T

    monkeypatch.setattr(Evaluation, "model", lambda _, name, **__: Linear(name).eval())
    words = [*shrunk("model", "explainer"), "task.replacement=0.5", "task.fractions={from:0.1,to:0.5,count:2}"]
    made = run(places, "experiment=discriminative_pixel_perturbation", *words)
    record = ensure(made)
    (batch,) = Evaluation(made, upstream_of(made)).batches(40, 40)
    right = []
    for image, label in zip(batch.images, batch.labels, strict=True):
        top = (slopes["model"] @ image.flatten()).argmax()
        order = slopes["explainer"][top].view(3, -1).std(0).argsort()
        for count in (102, 512):
            changed = image.flatten(1).clone()
            changed[:, order[:count]] = 0.5
            right.append((slopes["model"] @ changed.flatten()).argmax() == label)
    expected = 100 * torch.stack(right).view(40, 2).double().mean(0)
    assert record["metrics"]["accuracy"] == pytest.approx(expected.tolist())
    shown = slopes["explainer"][batch.labels[:8]].view(-1, 3, 32, 32)
    np.testing.assert_allclose(read_arrays(made.record_path)["gradients"], shown, rtol=1e-3)


def test_the_three_gradients_of_figure_5_5_against_equation_5_6() -> None:
    """With T = 1000, p is nearly uniform: Σ_j ∇f_j / K - ∇f_y but for a factor, another gradient than at T = 1."""
    from gradexp import gradients
    from gradexp.tasks.fool import maps

    model, data = net(), batch()
    found = maps(model, data, 1000.0)
    jacobian = gradients.input_gradient(model, data.images, data.labels, target="all")
    correct = jacobian[torch.arange(3), data.labels]
    torch.testing.assert_close(found["logit"], correct)
    p = model(data.images).softmax(1).detach()
    torch.testing.assert_close(found["loss"], torch.einsum("bk,bkchw->bchw", p, jacobian) - correct)
    cool = (model(data.images) / 1000).softmax(1).detach()
    expected = torch.einsum("bk,bkchw->bchw", cool, jacobian) - correct
    torch.testing.assert_close(1000 * found["loss@T=1000"], expected)
    assert (1000 * found["loss@T=1000"] - (jacobian.mean(1) - correct)).abs().max() < 0.01 * expected.abs().max()
    assert not torch.allclose(1000 * found["loss@T=1000"], found["loss"], rtol=0.1)
    torch.testing.assert_close(found["common"], jacobian.mean(1))
    picture = torch.randn(2, 4, 4, dtype=torch.float64)
    shifted = maps(Shifted(model, picture, amplitude=5.0), data, 1000.0)
    torch.testing.assert_close(shifted["common"] - found["common"], (5 * picture).expand(3, -1, -1, -1))
    torch.testing.assert_close(shifted["loss"], found["loss"])


def test_saliency_is_the_standard_deviation_of_the_signed_gradient_over_channels() -> None:
    gradient = torch.tensor([[1.0, -1.0], [2.0, 2.0]])[:, :, None, None]
    assert saliency(gradient, "channel_std").flatten().tolist() == [1, 0]
    assert saliency(gradient, "magnitude").flatten().tolist() == [2, 4]
    with pytest.raises(UserError, match="channel_std or magnitude"):
        saliency(gradient, "std")


def test_a_common_shift_moves_logit_gradients_alone() -> None:
    """§5.2 to rounding in float64, and the logit-gradients move by exactly the function's gradient."""
    from gradexp import gradients

    model, data = net(), batch()
    picture = torch.randn(2, 4, 4, dtype=torch.float64)
    shifted = Shifted(model, picture, amplitude=100.0)
    found = shift_effects(model, shifted, data.images, data.labels)
    assert found["shift/loss_change"] < 1e-12
    assert found["shift/loss_gradient_change"] < 1e-12
    assert found["shift/logit_gradient_change"] > 10
    moved = gradients.input_gradient(shifted, data.images, data.labels)
    expected = gradients.input_gradient(model, data.images, data.labels) + 100 * picture
    torch.testing.assert_close(moved, expected)


def test_a_run_of_shift_shows_what_it_measured(places: list[str]) -> None:
    """All eight images: logit-gradients move by the picture, the first image without its mean; loss-gradients stay."""
    made = run(places, "experiment=shift", *shrunk("model"), "task.images=8", "task.shown=8", "task.amplitude=3")
    metrics, arrays = ensure(made)["metrics"], read_arrays(made.record_path)
    look = Evaluation(made, upstream_of(made))
    model, (batch,) = look.model("model").double(), look.batches(9, 9)
    first, images, labels = batch.images[0], batch.images[1:].double().requires_grad_(), batch.labels[1:]
    picture, logits = (first - first.mean()).numpy(), model(images)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    logit, gradient = (
        torch.autograd.grad(value, images, retain_graph=True)[0].numpy() for value in (logits[range(8), labels].sum(), loss)
    )
    expected = {"picture": picture[None], "logit_before": logit, "logit_after": logit + 3 * picture}
    for name, values in {**expected, "loss_before": gradient, "loss_after": gradient}.items():
        np.testing.assert_allclose(arrays[name], values, rtol=1e-4, atol=1e-6 * np.abs(values).max(), err_msg=name)
    np.testing.assert_array_equal(arrays["images"], (255 * batch.images[1:]).round().numpy())
    assert metrics["shift/logit_gradient_change"] == pytest.approx(3 * np.abs(picture).max() / np.abs(logit).max(), rel=1e-4)
    assert max(metrics["shift/loss_change"], metrics["shift/loss_gradient_change"]) < 1e-9
    assert metrics["sine/gradient_bound"] == pytest.approx([1e-3 * m * 3072 for m in metrics["sine/frequency"]])
    assert 0 < max(metrics["sine/loss_change"]) <= 1e-3 * (1 + 1e-6)


def test_a_small_sine_moves_loss_gradients_within_its_bound() -> None:
    model, data = net(), batch()
    size = data.images[0].numel()
    for frequency in (1.0, 1e3, 1e6):
        loss, gradient = sine_effects(model, data.images, data.labels, epsilon=1e-3, frequency=frequency)
        assert loss <= 1e-3 * (1 + 1e-9)
        assert 0.01 * frequency * 1e-3 * size < gradient <= frequency * 1e-3 * size * (1 + 1e-9)


# --- tables and figures -----------------------------------------------------------------------------------


def test_signed_gradients_are_grey_at_zero_and_ignore_their_size() -> None:
    gradients = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    shown = signed(gradients)
    np.testing.assert_allclose(shown, signed(1000 * gradients), rtol=1e-6)
    assert (np.sign(shown - 0.5) == np.sign(gradients)).all()
    assert (signed(np.zeros((1, 3, 2, 2))) == 0.5).all()


def test_red_is_where_the_saliency_is() -> None:
    saliency_map = np.zeros((8, 8))
    saliency_map[:2, :2] = 1
    shown = red_over(np.full((3, 8, 8), 128, dtype=np.uint8), saliency_map)
    redness = shown[0] - shown[2]
    assert (redness[:2, :2] > 0.5).all()
    assert (redness[2:] == 0).all()


@pytest.mark.parametrize("number", ["5.1", "5.2", "5.3", "5.4", "5.5", "5.6", "5.7", "5.8", "shift"])
@pytest.mark.parametrize("scale", ["paper", "cpu", "quick"])
def test_figures_compose_at_every_scale(number: str, scale: str) -> None:
    spec = specs.load("figure", number)
    configs = [plan(words).config for *_, seeds in specs.cells(spec, scale) for words in seeds.values()]
    expected = "digits" if scale == "quick" else "cifar10" if number in ("5.6", "5.7") else "cifar100"
    assert {config["data"]["name"] for config in configs} == {expected}


def series_of(folder: Path, spec: dict[str, Any], metrics: dict[str, Any], **arrays: np.ndarray) -> list[figures.Series]:
    """The figure's series, each with one record; numbers differ from series to series."""
    made = []
    for i, one in enumerate(spec["series"]):
        source = fake_run(f"{i:012x}", folder / f"{i}.json")
        numbers = {name: (np.array(value) + i).tolist() for name, value in metrics.items()}
        record: dict[str, Any] = {"status": "finished", "metrics": numbers}
        if arrays:
            record["arrays"] = write_arrays(source.record_path.with_suffix(".npz"), arrays)
        write_record(source.record_path, record)
        made.append(figures.Series(one, (source,)))
    return made


@pytest.mark.parametrize("number", ["5.1", "5.3", "5.6"])
def test_panels_show_every_curve_of_every_series(number: str, tmp_path: Path) -> None:
    spec = specs.load("figure", number)
    names = [curve["metric"] for curve in spec["curves"]]
    metrics = {spec["x"]: [0.1, 1.0]} | {name: [10.0 * j, 20.0 * j] for j, name in enumerate(names, start=1)}
    figure, rows = panels(spec, series_of(tmp_path, spec, metrics))
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == list(spec.get("panels", {}).values())
    assert len(figure.axes) == len(names) * max(1, len(spec.get("panels", {})))
    assert sum(len(axes.lines) for axes in figure.axes) == len(spec["series"]) * len(names)
    drawn = {(row["panel"], row["series"], row["metric"], float(row["mean"])) for row in rows}
    assert drawn == {
        (one.get("panel", ""), one["label"], name, value + i)
        for i, one in enumerate(spec["series"])
        for name in names
        for value in metrics[name]
    }


def test_figure_5_5_has_the_three_energies_before_and_after(tmp_path: Path) -> None:
    spec = specs.load("figure", "5.5")
    kinds = ("logit", "loss", "loss@T=1000", "common")
    energies = {f"energy/{kind}/{when}": 10.0 * i for i, kind in enumerate(kinds) for when in ("before", "after")}
    metrics = energies | {"energy/uniform": 22.0, "test/accuracy": 60.0, "test/accuracy/before": 61.0}
    metrics |= {"common/before": 0.1, "common/after": 0.7}
    maps = {f"{kind}_{when}": np.ones((2, 4, 4)) for kind in kinds for when in ("before", "after")}
    pictures = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    figure, rows = fooling(spec, series_of(tmp_path, spec, metrics, images=pictures, mask=np.ones((4, 4)), **maps))
    assert len(figure.axes) == 2 * (1 + len(spec["columns"]))
    assert figure.axes[0].get_title() == "accuracy 61.0→60.0 %\nmask 22.0 %"
    drawn, *others = (one["label"] for one in spec["series"])
    whose = [row["what"].partition(": ")[0] if row["what"].startswith(drawn) else drawn for row in rows]
    for i, label in enumerate([drawn, *others]):
        found = [float(row["percent"]) for row, name in zip(rows, whose, strict=True) if name == label]
        assert sorted(found) == sorted(x + i for x in metrics.values())
    assert {row["thesis"] for row in rows} == {"", *spec["thesis"].values()}


def test_figure_5_8_has_the_errors_beside_the_pictures(tmp_path: Path) -> None:
    spec = specs.load("figure", "5.8")
    pictures = {name: np.zeros((2, 3, 4, 4), dtype=np.uint8) for name in ("images", "noisy", "denoised")}
    figure, _ = samples(spec, series_of(tmp_path, spec, {"error/noisy": 0.1, "error/denoised": 0.2}, **pictures))
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    errors = [f"{one['label']}\n{0.2 + i:.3f}" for i, one in enumerate(spec["series"])]
    assert labels == ["Image", "With noise\n0.100", *errors]


def test_the_figure_of_shifts(tmp_path: Path) -> None:
    spec = specs.load("figure", "shift")
    curves = {f"sine/{name}": [1.0, 2.0] for name in ("frequency", "loss_change", "gradient_change", "gradient_bound")}
    gradients = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32)
    maps = {f"{kind}_{when}": gradients for kind in ("logit", "loss") for when in ("before", "after")}
    pictures = np.zeros((1, 3, 4, 4), dtype=np.uint8)
    drawn = series_of(tmp_path, spec, curves | dict.fromkeys(spec["metrics"], 3.0), images=pictures, **maps)
    figure, rows = shift(spec, drawn)
    assert len(figure.axes[-1].lines) == 3
    assert [row["value"] for row in rows] == ["3"] * len(spec["metrics"]) + ["1", "2"] * 3


def test_table_5_2_is_the_sweep_around_table_5_1() -> None:
    """The thesis's own λ and μ are the score-matching run of Table 5.1; at scale=cpu two antidiagonals run, trained as long."""
    for scale in ("paper", "cpu"):
        (first, second) = (specs.cells(specs.load("table", number), scale) for number in ("5.1", "5.2"))
        sweep = {(row["label"], column["label"]): plan(seeds[0]) for row, column, seeds in second if seeds}
        score = next(seeds for row, _, seeds in first if row["thesis"] == "Score-Matching")
        assert sweep["λ = 1e-3", "μ = 1e-4"].id == plan(score[0]).id
    models = [run.config["upstream"]["model"] for run in sweep.values()]
    terms = [model["method"]["terms"]["score_matching"] for model in models]
    products = sorted(term["weight"] * term["stability"] for term in terms)
    assert products == pytest.approx([1e-8] * 4 + [1e-7] * 4)
    assert {model["optim"]["passes"] for model in models} == {10}
    assert {("λ = 1e-5", "μ = 1e-3"), ("λ = 1e-2", "μ = 1e-5")} <= sweep.keys()  # the thesis's best and worst


def test_the_runs_that_test_the_account_of_table_5_1_have_the_w_that_their_rows_say() -> None:
    """w = λ(½ + 4μ/σ²) of score-matching, the weight of gradient-norm; judge, sampling and data are Table 5.1's."""
    spec = specs.load("table", "5.1-penalty")
    cells = specs.cells(spec, "cpu")
    runs = {row["label"]: plan(seeds[0]).config for row, column, seeds in cells if "experiment" not in column}
    ours = plan(next(specs.cells(specs.load("table", "5.1"), "cpu"))[2][0]).config
    told = 0
    for label, config in runs.items():
        terms = config["upstream"]["model"]["method"]["terms"]
        if "w = " in label:
            told += 1
            score = terms.get("score_matching")
            gradient = score["weight"] * (0.5 + 4 * score["stability"] / score["sigma"] ** 2) if score else 0.0
            w = gradient or terms["gradient_norm"]["weight"]
            assert w == pytest.approx(float(label.partition("w = ")[2]), rel=0.02)
    assert told == 6
    assert {run_id(config["upstream"]["judge"]) for config in runs.values()} == {run_id(ours["upstream"]["judge"])}
    passes = {label: config["upstream"]["model"]["optim"]["passes"] for label, config in runs.items()}
    assert {label for label, count in passes.items() if count != 10} == {"the same, 20 epochs, the rate in steps"}
    shared = {run_id(plan(seeds[0]).config) for *_, seeds in specs.cells(specs.load("table", "5.2"), "cpu") if seeds}
    assert len(shared & {run_id(config) for config in runs.values()}) == 4  # the score-matching rows with a μ above 0


def test_a_gallery_names_the_model_that_diverged(tmp_path: Path) -> None:
    """Its pictures are black, and its row says why; the CSV file has what was measured of each model."""
    made = []
    for label, status in (("a", "finished"), ("b", "diverged")):
        source = fake_run(label, tmp_path / f"{label}.json")
        facts = write_arrays(source.record_path.with_suffix(".npz"), {"samples": np.zeros((2, 3, 4, 4), dtype=np.uint8)})
        write_record(source.record_path, {"status": status, "metrics": {"logit": 1.5}, "arrays": facts})
        made.append(figures.Series({"label": label}, (source,)))
    figure, rows = samples({"array": "samples", "metrics": ["logit"]}, made)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["a", "b\n(diverged)"]
    assert rows == [{"series": label, "logit": "1.5", "run": label} for label in ("a", "b")]
