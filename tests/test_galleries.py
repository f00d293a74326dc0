"""What the runs behind figures 2.1, 3.1, 3.3 and 3.4 record, against direct formulas."""

from typing import Any

import numpy as np
import pytest
import torch
from fakes import upstream_of
from torch import Tensor, nn

from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.evaluation import Evaluation
from gradexp.engine.record import read_arrays
from gradexp.engine.run import Paths, Run
from gradexp.saliency import FullGrad
from gradexp.tasks import illustration

JACOBIAN = illustration.Jacobian
TINY = ["scale=quick", "trainer.threads=1", "logger=none"]
TEACHER = [f"+upstream.model.{word}" for word in ("optim.passes=3", "scale.width=0.1")]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One for all tests here, which share a teacher."""
    folder = tmp_path_factory.mktemp("galleries")
    return [f"paths.results={folder}/results", f"paths.outputs={folder}/outputs"]


def run(places: list[str], *words: str) -> Run:
    config = compose_run([*words, *TINY, *places])
    return Run(config, Paths.of(config))


def test_the_students_of_figure_2_1(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the points: the teacher's values alone; values and slopes, of weight sigma squared; under strong noise, neither."""
    weights: list[float] = []
    monkeypatch.setattr(illustration, "Jacobian", lambda **given: weights.append(given["weight"]) or JACOBIAN(**given))
    made = run(places, "experiment=jacobian_illustration", "task.steps=200", "task.sigma=0.8")
    metrics, arrays = ensure(made)["metrics"], read_arrays(made.record_path)
    x, curves = arrays["x"], {name: arrays[name] for name in ("teacher", "activations", "noise", "jacobian")}
    assert np.std(curves["teacher"] - np.sin(2 * x) - 0.4 * x) < 0.2
    off: dict[str, tuple[float, float]] = {}
    for name, curve in curves.items():
        values, slopes = (np.interp(arrays["points"], x, each) for each in (curve, np.gradient(curve, x)))
        off[name] = np.abs(values - arrays["values"]).max(), np.abs(slopes - arrays["slopes"]).max()
        distance = np.sqrt(np.mean((curve - curves["teacher"]) ** 2))
        assert name == "teacher" or metrics[f"rms/{name}"] == pytest.approx(distance, rel=1e-3)
    assert max(off["teacher"]) < 5e-3 and max(off["jacobian"]) < 0.03 and weights == pytest.approx([0.64])
    assert off["activations"][0] < 0.03 and off["activations"][1] > 1
    assert min(off["noise"]) > 0.1


def explained(made: Run) -> tuple[dict[str, Any], dict[str, np.ndarray], nn.Module, Tensor]:
    """The record and arrays of a gallery; its model; the test images that the model classifies correctly, in their order."""
    record, look = ensure(made), Evaluation(made, upstream_of(made))
    model, everything = look.model("model"), next(iter(look.data.test_loader(batch_size=999, device="cpu")))
    right = everything.images[model(everything.images).argmax(1) == everything.labels]
    shown = right[: len(read_arrays(made.record_path)["images"])]
    return dict(record), read_arrays(made.record_path), model, shown


def test_a_gallery_has_the_first_images_that_are_recognised_and_their_maps(places: list[str]) -> None:
    """More than one batch of them; labels are the predictions, and maps are of these."""
    made = run(places, "experiment=saliency_gallery", *TEACHER, "saliency=input_gradient", "evaluate.images=70")
    record, arrays, model, images = explained(made)
    assert record["metrics"]["gallery/images"] == len(images) == 70
    mean, std = (values.view(3, 1, 1) for values in Evaluation(made, upstream_of(made)).data.colours)
    assert ((images * std + mean) * 255 - torch.from_numpy(arrays["images"]).float()).abs().max() < 0.01
    images.requires_grad_()
    top, predictions = model(images).max(1)
    assert record["labels"] == predictions.tolist() and record["names"] == [str(label) for label in record["labels"]]
    maps = torch.autograd.grad(top.sum(), images)[0].abs().sum(1)
    np.testing.assert_allclose(arrays["maps"], maps / maps.amax((1, 2), keepdim=True), atol=2e-3)


def test_the_maps_of_layers_add_up_to_fullgrad(places: list[str]) -> None:
    """Each is divided by its own largest value; the sizes of biases are those of the network's parameters."""
    made = run(places, "experiment=bias_gradient_maps", *TEACHER)
    record, arrays, model, images = explained(made)
    method = FullGrad()
    layers = method.layers(model, images)
    torch.testing.assert_close(torch.stack(list(layers.values())).sum(0), method(model, images))
    for name, maps in {"maps": method(model, images), **{f"layer/{name}": maps for name, maps in layers.items()}}.items():
        np.testing.assert_allclose(arrays[name], (maps / maps.amax((1, 2, 3), keepdim=True))[:, 0], atol=2e-3, err_msg=name)
    assert record["layers"] == list(layers)
    assert record["metrics"]["test/completeness_error"] < 1e-4
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    implicit = torch.cat([norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt() for norm in norms])
    explicit = torch.cat([value for name, value in model.named_parameters() if name.endswith("bias")])
    found = record["metrics"]["bias/implicit"], record["metrics"]["bias/explicit"]
    assert found == pytest.approx((implicit.abs().mean().item(), explicit.abs().mean().item()), rel=1e-4)
