"""What users call on their own networks: evaluation as functions, Quantus, the examples and the table of docs/library.md."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from test_docs import blocks
from torch import nn

from gradexp import evaluate
from gradexp.base.errors import UserError
from gradexp.engine.run import ROOT
from gradexp.evaluate.model_randomisation import UNTOUCHED
from gradexp.saliency import FullGrad, InputGradient, SimpleFullGrad, SmoothGrad

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 3)).train()


def test_perturbed_pixels_change_the_output_as_far_as_the_method_knows() -> None:
    model = network()
    changes = evaluate.perturb_pixels(model, IMAGES, InputGradient(), fractions=(0, 0.25, 1), fill=0.0)
    assert changes.shape == (4, 3)
    assert not changes[:, 0].any()
    with torch.no_grad():
        before, top = model.eval()(IMAGES).max(1)
        empty = model(torch.zeros_like(IMAGES)).gather(1, top[:, None])[:, 0]
    torch.testing.assert_close(changes[:, 2], (empty - before).abs() / before.abs())
    most = evaluate.perturb_pixels(model, IMAGES, InputGradient(), fractions=[0.25], order="most", fill=0.0)
    assert float(most.mean()) > float(changes[:, 1].mean())
    with pytest.raises(UserError, match="least or most"):
        evaluate.perturb_pixels(model, IMAGES, InputGradient(), order="last")


def test_the_salient_mask_holds_the_largest_values_of_the_map() -> None:
    model, method = network(), FullGrad()
    maps = method(model, IMAGES)
    mask = evaluate.salient_mask(model, IMAGES, method, 0.25)
    assert mask.shape == (4, 1, 8, 8)
    assert mask.sum((1, 2, 3)).tolist() == [16] * 4
    for saliency, chosen in zip(maps, mask, strict=True):
        assert float(saliency[chosen].min()) >= float(saliency[~chosen].max())
    assert not (evaluate.salient_mask(model, IMAGES, method, 0.5, order="least") & mask).any()
    assert torch.equal(evaluate.remove(IMAGES, mask, 0.0) == 0, mask.expand_as(IMAGES))


def test_completeness_of_any_network() -> None:
    model = network()
    for method in (None, FullGrad(separate=True)):
        assert float(evaluate.completeness_error(model, IMAGES, method).max()) < 1e-5
    assert model.training


def test_randomisation_leaves_the_model_alone_and_is_that_of_each_image() -> None:
    model = network()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    correlations = evaluate.randomisation_correlations(model, IMAGES, SmoothGrad(samples=2), batch_size=3)
    assert list(correlations) == [UNTOUCHED, "5", "0 and 1"]
    assert {values.shape for values in correlations.values()} == {(4,)}
    assert correlations[UNTOUCHED].tolist() == [1] * 4
    assert all(abs(float(value)) < 0.999 for value in correlations["0 and 1"])
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    again = evaluate.randomisation_correlations(model, IMAGES, SmoothGrad(samples=2), batch_size=3)
    assert all(torch.equal(again[name], values) for name, values in correlations.items())


def test_names_of_the_library_are_found_and_others_are_not() -> None:
    assert set(evaluate.WHERE) <= set(dir(evaluate))
    with pytest.raises(AttributeError, match="has no attribute 'perturb'"):
        evaluate.perturb  # noqa: B018


# --- Quantus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["arrays", "tensors"])
def test_explain_func_has_the_signature_that_quantus_calls(kind: type) -> None:
    """`explain_func(model=..., inputs=..., targets=..., **explain_func_kwargs)`, as Metric.explain_batch of Quantus 0.6."""
    model, labels = network(), torch.tensor([2, 0, 1, 1])
    explain = evaluate.explain_func(FullGrad())
    maps = explain(model=model, inputs=kind(IMAGES.double()), targets=kind(labels), device="cpu", unknown=1)
    assert isinstance(maps, np.ndarray)
    np.testing.assert_allclose(maps, FullGrad()(model, IMAGES, labels).numpy(), rtol=1e-5)


def test_a_method_inside_quantus() -> None:
    quantus = pytest.importorskip("quantus")
    model = network().eval()
    with torch.no_grad():
        labels = model(IMAGES).argmax(1).numpy()
    metric = quantus.Sparseness(disable_warnings=True, display_progressbar=False)
    options = {"model": model, "x_batch": IMAGES.numpy(), "y_batch": labels, "device": "cpu"}
    flat, peaked = (
        metric(**options, explain_func=evaluate.explain_func(method))
        for method in (FullGrad(psi=["upsample"]), SimpleFullGrad())
    )
    assert len(flat) == len(peaked) == 4
    maps = InputGradient()(model, IMAGES, torch.as_tensor(labels)).numpy()
    inside = metric(**options, explain_func=evaluate.explain_func(InputGradient()))
    np.testing.assert_allclose(inside, metric(**options, a_batch=maps), rtol=1e-5)
    correlation = quantus.FaithfulnessCorrelation(nr_runs=5, subset_size=16, disable_warnings=True, display_progressbar=False)
    assert np.isfinite(correlation(**options, explain_func=evaluate.explain_func(FullGrad()))).all()


# --- docs/library.md ----------------------------------------------------------------------------------------


def titled() -> list[tuple[str, str]]:
    """(heading, code) of the page's examples."""
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    return re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_example_has_a_heading() -> None:
    assert len(titled()) == len(blocks("docs/library.md", "python")) >= 10


@pytest.mark.parametrize(("heading", "code"), titled(), ids=[heading for heading, _ in titled()])
def test_examples(heading: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with random networks in place of published ones: a narrow one of each architecture."""
    if "quantus" in code:
        pytest.importorskip("quantus")
    small = {"resnet50": lambda: torchvision.models.resnet18(num_classes=10), "vit_b_16": transformer}
    for name, make in small.items():
        monkeypatch.setattr(torchvision.models, name, lambda weights=None, make=make: make())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exec(compile(code, f"docs/library.md: {heading}", "exec"), {"images": images, "labels": torch.tensor([1, 0])})


def transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=10)


def test_the_table_is_that_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_library_table.py"])
    import make_library_table as script

    rows = script.read(script.ROWS)
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.between(script.table(rows, script.parameter_counts())) in page
    assert set(rows) <= set(script.parameter_counts())


@pytest.mark.parametrize(("error", "shown"), [("1.1e-07", "1.1e-07"), ("1.0e-07", "1.0e-07"), ("9.9e-08", "< 1e-07")])
def test_an_error_of_the_table_is_not_shown_as_smaller_than_it_is(error: str, shown: str) -> None:
    import make_library_table as script

    row = {"fullgrad": "yes", "error": error, "outside": "0.1", "accelerate": "1e-12"}
    assert f"| {shown} |" in script.table({"resnet18": row}, {"resnet18": 1})[2]


def test_a_row_of_the_table(tmp_path: Path) -> None:
    import make_library_table as script

    row = script.row_of("squeezenet1_1", 1)
    assert row["fullgrad"] == "yes"
    assert float(row["error"]) < 1e-4
    assert float(row["accelerate"]) < 1e-9


def test_the_notebook_is_executed_and_its_code_runs() -> None:
    """With a shorter training; the stored outputs have figures."""
    import run_notebook

    notebook = json.loads((ROOT / "docs" / "fullgrad.ipynb").read_text(encoding="utf-8"))
    kinds = [output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert kinds.count("display_data") == 2
    for cell in notebook["cells"]:
        cell["source"] = [line.replace("range(400)", "range(2)") for line in cell["source"]]
        cell["source"] = [line.replace("slice(1500, None)", "slice(1500, 1510)") for line in cell["source"]]
    again = run_notebook.executed(notebook)
    assert [output["output_type"] for cell in again["cells"] for output in cell.get("outputs", [])] == kinds
