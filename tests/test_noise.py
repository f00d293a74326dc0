"""Table 2.2: what is trained, what is shared, and what noise does."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.run import Paths, Run, run_id
from gradexp.evaluate.accuracy import accuracy
from gradexp.evaluate.noise import noise_accuracies
from gradexp.report import specs

TINY = ["scale=quick", "trainer.threads=1", "logger=none", "task.draws=3"]
SMALL = ["+upstream.model.scale.width=0.04", "upstream.model.optim.passes=1", "upstream.model.data.per_class=5"]


@pytest.mark.parametrize("scale", ["paper", "quick"])
def test_lambda_0_is_the_teacher_of_table_2_1(scale: str) -> None:
    """One id, so it is trained once."""
    noisy = plan(["experiment=noise_robustness", f"scale={scale}"]).config["upstream"]["model"]
    distilled = plan(["experiment=jacobian_distill", f"scale={scale}"]).config["upstream"]["teacher"]
    assert run_id(noisy) == run_id(distilled) == run_id(compose_run(["experiment=teacher", f"scale={scale}"]))


def test_the_rows_are_seven_models_of_one_protocol() -> None:
    spec = specs.load("table", "2.2")
    models = [plan(seeds[0]).config["upstream"]["model"] for row, column, seeds in specs.cells(spec, "cpu")]
    assert len({run_id(model) for model in models}) == 7
    protocol = {(model["data"]["per_class"], model["optim"]["passes"], model["model"]["width"]) for model in models}
    assert protocol == {(100, 80, 0.5)}
    weights = [model["method"]["terms"].get("gradient_norm", {}).get("weight", 0) for model in models[::5]]
    assert weights == [0, 0.01, 0.1, 1, 10, 0, 0]
    assert models[25]["optim"]["optimizer"]["weight_decay"] == 0.001
    assert models[30]["model"]["dropout"] == 0.25


def test_the_penalty_of_cross_entropy_is_a_method() -> None:
    term = compose_run(["experiment=teacher", "method=gradient_norm_logprob"])["method"]["terms"]["gradient_norm"]
    assert term["target"] == "logprob"


def test_one_record_holds_every_sigma(places: list[str]) -> None:
    config = compose_run(["experiment=noise_robustness", *TINY, *SMALL, *places])
    run = Run(config, Paths.of(config))
    metrics = ensure(run)["metrics"]
    sigmas = ("0.1", "0.2", "0.3", "0.4")
    expected = {f"test/accuracy@noise={sigma}{part}" for sigma in sigmas for part in ("", "/std")}
    assert metrics.keys() == expected | {"test/accuracy@noise=0"}
    assert metrics["test/accuracy@noise=0"] == run.upstream["model"].record()["metrics"]["test/accuracy"]  # type: ignore[index]


def test_a_sigma_has_the_mean_and_the_deviation_of_its_own_draws(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of accuracies 100 sigma plus 0, 1 and 4, whose deviation (draws - 1) is the square root of 13/3."""
    told = lambda *_, sigma, draws, **__: [100 * sigma + draw**2 for draw in range(draws)]
    monkeypatch.setattr("gradexp.tasks.noise.noise_accuracies", told)
    config = compose_run(["experiment=noise_robustness", *TINY, *SMALL, "task.sigmas=[0.4,0,0.1]", *places])
    metrics = ensure(Run(config, Paths.of(config)))["metrics"]
    expected = {"0.4": 40 + 5 / 3, "0.4/std": math.sqrt(13 / 3), "0": 0, "0.1": 10 + 5 / 3, "0.1/std": math.sqrt(13 / 3)}
    assert metrics == pytest.approx({f"test/accuracy@noise={name}": value for name, value in expected.items()}, abs=1e-4)


def test_a_model_that_diverged_gives_nan(places: list[str]) -> None:
    huge = ["+upstream.model.optim.optimizer.lr=1e30", "upstream.model.optim.passes=3"]
    config = compose_run(["experiment=noise_robustness", *TINY, *SMALL, *huge, *places])
    record = ensure(Run(config, Paths.of(config)))
    assert record["status"] == "diverged"
    assert set(record["metrics"].values()) == {None}  # JSON has no NaN


class Sign(nn.Module):
    """Two classes, told apart by the sign of the first pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first = images[:, 0, 0, 0]
        return torch.stack([-first, first], dim=1)


def batches(count: int) -> list[Batch]:
    images = torch.ones(count, 1, 2, 2)
    rows = torch.arange(count)
    return [Batch(images, torch.ones(count, dtype=torch.long), rows, rows)]


def noisy(sigma: float, **changes: Any) -> list[float]:
    options = {"draws": 4, "seed": 0, "classes": 2, "device": torch.device("cpu")}
    return noise_accuracies(Sign(), batches(5000), sigma=sigma, **{**options, **changes})


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_accuracy_under_noise_is_the_normal_distribution(sigma: float) -> None:
    """P(1 + sigma z > 0) = Phi(1 / sigma)."""
    expected = 50 * (1 + math.erf(1 / (sigma * math.sqrt(2))))
    values = noisy(sigma)
    error = 100 * math.sqrt(0.25 / 5000)
    assert all(abs(value - expected) < 4 * error for value in values)
    assert len(set(values)) > 1


def test_draws_are_a_function_of_the_seed() -> None:
    assert noisy(1.0) == noisy(1.0) != noisy(1.0, seed=1)
    assert noisy(0.0, draws=1) == [accuracy(Sign(), batches(5000), classes=2, device=torch.device("cpu"))] == [100.0]


def test_null_leaves_a_default_and_choice_takes_a_group() -> None:
    from gradexp.engine.build import build

    node = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.1, "weight_decay": None}
    assert build(node, where="optim.optimizer").keywords == {"lr": 0.1}
    other = {**node, "_target_": "torch.optim.Rprop"}  # which has none
    assert build(other, where="optim.optimizer").keywords == {"lr": 0.1}
    with pytest.raises(UserError, match="takes no such key"):
        build({**node, "weight_dekay": 0}, where="optim.optimizer")
    with pytest.raises(UserError, match="takes no such key"):
        build({"_target_": "gradexp.terms.CrossEntropy", "weight": 1, "wait": None}, where="method.terms.cross_entropy")


def test_logits_that_are_no_numbers_have_no_accuracy() -> None:
    """Their largest is the first, which is right for a tenth of the images."""
    batch = Batch(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), torch.arange(4), torch.zeros(4, dtype=torch.long))
    for bias, expected in (torch.ones(2), 100.0), (torch.tensor([1.0, torch.nan]), torch.nan):
        model = nn.Linear(1, 2)
        model.bias = nn.Parameter(bias * torch.tensor([2.0, 1.0]))
        assert accuracy(model, [batch], classes=2, device=torch.device("cpu")) == pytest.approx(expected, nan_ok=True)
