"""Chapter 5 against the formulas of the thesis and of the author's published code: numbers of an implementation of its own.

tests/golden/chapter5.json, which tests/golden/chapter5.py makes by plain autograd, without gradexp: float64, a given network in
train mode, given noise. Equal to 1e-12 of the largest entry, for the constants that the configs state at scale=paper.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradexp import layers
from gradexp.data.loader import Batch
from gradexp.engine.assemble import make_terms
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.run import ROOT
from gradexp.evaluate.density_ratio import density_ratio
from gradexp.models.resnet import ResNet
from gradexp.sampling import Draws
from gradexp.terms import Step

FILE = ROOT / "tests" / "golden" / "chapter5.json"
GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
METHODS = ["score_matching", "anti_score_matching", "half_gradient_norm"]


def given(name: str) -> Tensor:
    return torch.tensor(GOLDEN["inputs"][name], dtype=torch.long if name == "labels" else torch.float64)


def batch() -> Batch:
    return Batch(given("images"), given("labels"), torch.arange(4), torch.zeros(4, dtype=torch.long))


def net(prepared: Callable[[nn.Module], nn.Module] = layers.accelerate) -> nn.Module:
    model = ResNet(
        name="t", blocks=[1, 1], width=1 / 32, channels=2, classes=3, activation=lambda: nn.Softplus(beta=10)
    ).double()
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in GOLDEN["parameters"].items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return prepared(model)


def assert_same(found: Any, expected: Any) -> None:
    """To 1e-12 of the largest entry."""
    ours, theirs = (torch.as_tensor(values, dtype=torch.float64) for values in (found, expected))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def noise_is_given(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("gradexp.layers.ranks.normal_like", lambda images: given("noise").to(images))


@pytest.mark.parametrize("prepared", [layers.accelerate, lambda model: model], ids=["fast", "autograd"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_is_the_published_one(
    method: str, prepared: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, parameter gradients, and the running statistics that the step leaves: the noisy images move them too."""
    noise_is_given(monkeypatch)
    model, expected = net(prepared).train(), GOLDEN["training"][method]
    terms = make_terms(compose_run(["experiment=score_matching", f"method={method}", "scale=paper"]))
    step = Step(batch(), model, differentiable_input=True)
    (name,) = terms.keys() - {"cross_entropy"}
    values = {key: terms[key].weight * terms[key](step) for key in ("cross_entropy", name)}
    assert_same(values["cross_entropy"].detach(), expected["cross_entropy"])
    assert_same(values[name].detach(), expected["regulariser"])
    slopes = torch.autograd.grad(torch.stack(list(values.values())).sum(), list(model.parameters()))
    names = [key for key, _ in model.named_parameters()]
    assert set(names) == set(expected["gradients"])
    for key, slope in zip(names, slopes, strict=True):
        assert_same(slope, expected["gradients"][key])
    for key, statistic in expected["running"].items():
        assert_same(model.get_buffer(key), statistic)


def test_the_ascent_is_the_published_one() -> None:
    """Step by step; its 500 steps are those of the config."""
    sampling = compose_run(["experiment=gan_test", "scale=paper"])["task"]["sampling"]
    ascent = build(sampling | {"steps": 5}, where="task.sampling")
    unused = Draws([0] * 4, (2, 6, 6), torch.device("cpu"))
    assert_same(ascent.climb(net().eval(), given("images"), given("labels"), unused), GOLDEN["sampling"])


def test_the_density_ratio_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn", lambda *_, **__: given("noise"))
    found = density_ratio(net().eval(), [batch()], sigmas=[0.0, 0.01, 0.1, 0.5], seed=0)
    assert_same(found["density_ratio"], GOLDEN["density_ratio"]["mean"])
    assert_same(found["density_ratio/log"], GOLDEN["density_ratio"]["log"])


def test_the_file_is_what_its_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("golden_chapter5", FILE.with_suffix(".py"))
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert not re.search(r"^(from|import) gradexp", FILE.with_suffix(".py").read_text(encoding="utf-8"), re.MULTILINE)
    _assert_alike(script.numbers(), GOLDEN)


def _assert_alike(made: Any, stored: Any) -> None:
    if isinstance(stored, dict):
        assert made.keys() == stored.keys()
        for key, value in stored.items():
            _assert_alike(made[key], value)
    else:
        assert_same(made, stored)
