"""Model randomisation: which layers, what they become, and what is left of the maps."""

import copy
from typing import ClassVar

import pytest
import torch
from fakes import upstream_of
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import prune

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.evaluation import Evaluation
from gradexp.engine.record import read_record
from gradexp.engine.run import Paths, Run
from gradexp.evaluate.model_randomisation import layers_from_output, randomisation_correlations, randomise, rank_correlation
from gradexp.models.vgg import VGG
from gradexp.saliency import InputGradient, Saliency


def trained() -> nn.Module:
    """A small network with no parameter or statistic at its initial value."""
    model = VGG(name="t", layers=[4, "M", 5], width=1, channels=3, classes=2, dropout=None).eval()
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 2, 3)
    return model


def untouched(model: nn.Module) -> set[str]:
    """The modules that `trained` made, by their parameters and statistics."""
    own = {name: [*m.parameters(recurse=False), *m.buffers(recurse=False)] for name, m in model.named_modules()}
    floats = {name: [value for value in values if value.is_floating_point()] for name, values in own.items()}
    return {name for name, values in floats.items() if values and all(float(value.min()) >= 2 for value in values)}


def test_layers_go_from_the_output_to_the_input_with_their_normalisations() -> None:
    model = trained()
    groups = layers_from_output(model)
    assert groups == [["linear"], ["features.conv2", "features.norm2"], ["features.conv1", "features.norm1"]]
    left = {"linear", "features.conv2", "features.norm2", "features.conv1", "features.norm1"}
    for count in range(4):
        randomise(model, groups[:count], seed=3)
        assert untouched(model) == left - {name for names in groups[:count] for name in names}
    assert torch.equal(model.features.norm1.running_mean, torch.zeros(4))  # type: ignore[union-attr]

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(UserError, match=r"Bare .* no reset_parameters"):
        layers_from_output(nn.Sequential(Bare()))
    pruned = nn.Sequential(nn.Conv2d(1, 2, 3))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(UserError, match=r"Conv2d \(0\) can't be randomised: its weight is computed .* prune.remove"):
        layers_from_output(pruned)
    prune.remove(pruned[0], "weight")
    assert layers_from_output(pruned) == [["0"]]


def test_randomised_parameters_do_not_depend_on_earlier_randomisations() -> None:
    """A resumed run skips the layers that were done; another seed draws other parameters."""
    step_by_step, at_once, other = trained(), trained(), trained()
    groups = layers_from_output(at_once)
    for count in range(1, 4):
        randomise(step_by_step, groups[:count], seed=3)
    torch.rand(5)
    randomise(at_once, groups, seed=3)
    randomise(other, groups, seed=4)
    pairs = zip(step_by_step.parameters(), at_once.parameters(), other.parameters(), strict=True)
    same, differ = zip(*((torch.equal(a, b), not torch.equal(a, c)) for a, b, c in pairs), strict=True)
    assert all(same)
    assert any(differ)


def test_randomised_parameters_do_not_depend_on_the_layout_of_the_weights() -> None:
    """Accelerated convolutions have theirs in channels_last, and keep it; torch 2.14's draw in the logical order themselves."""

    class Direct(nn.Conv2d):
        """Draws into its weight, as torch's convolutions did before."""

        def reset_parameters(self) -> None:
            nn.init.uniform_(self.weight)

    stock = nn.Sequential(trained().features, Direct(5, 4, 3))
    fast = layers.accelerate(copy.deepcopy(stock)).to(memory_format=torch.channels_last)
    for model in (stock, fast):
        randomise(model, layers_from_output(model), seed=3)
    for name, value in fast.named_parameters():
        assert torch.equal(value, stock.get_parameter(name)), name
        assert value.ndim < 4 or value.is_contiguous(memory_format=torch.channels_last)


def test_rank_correlation_is_spearmans_of_absolute_values() -> None:
    first, second = torch.randn(4, 1, 6, 6), torch.randn(4, 1, 6, 6)
    second[1] = -first[1] * 3  # the same sizes
    second[2].clamp_(min=0)  # ties, as Grad-CAM has
    second[3] = 0.5
    found = rank_correlation(first, second)
    rounded = first.bfloat16(), second.bfloat16()
    assert torch.equal(rank_correlation(*rounded), rank_correlation(*(each.float() for each in rounded)))
    expected = [
        float(stats.spearmanr(a.abs().flatten(), b.abs().flatten()).statistic) for a, b in zip(first, second, strict=True)
    ]
    torch.testing.assert_close(found[:3], torch.tensor(expected[:3], dtype=torch.float64))
    assert float(found[1]) == pytest.approx(1)
    assert float(found[3]) == 0  # of a constant map nothing is left


def tiny(places: list[str], *words: str) -> Run:
    shape = ["scale=quick", "scale.width=0.04", "logger=none", "trainer.threads=1", "+upstream.model.optim.passes=1"]
    shape += ["+upstream.model.scale.width=0.04", "+upstream.model.data.per_class=4"]
    config = compose_run(
        ["experiment=model_randomisation", *shape, "evaluate.images=6", "evaluate.batch_size=4", *words, *places]
    )
    return Run(config, Paths.of(config))


class Noting(Saliency):
    """Notes the classes that are explained, and the last layer of the network."""

    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        self.seen.append((labels, model.linear.weight.clone()))  # type: ignore[operator, union-attr]
        return images.sum(1, keepdim=True)


def check_noted(model: nn.Module, *batches: Tensor) -> None:
    """All maps were of the classes that `model` predicts, and only the first of each batch were of `model` itself."""
    classes = [model(images).argmax(1) for images in batches]
    assert len(Noting.seen) == (1 + len(layers_from_output(model))) * len(batches)
    for number, (labels, weight) in enumerate(Noting.seen):
        assert torch.equal(labels, classes[number % len(batches)])
        assert torch.equal(weight, model.linear.weight) == (number < len(batches))  # type: ignore[arg-type, union-attr]


def test_a_run_explains_the_classes_that_the_trained_network_predicts(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noting, "seen", [])
    monkeypatch.setattr("gradexp.tasks.saliency_score.make_saliency", lambda *_: Noting())
    run = tiny(places)
    ensure(run)
    look = Evaluation(run, upstream_of(run))
    check_noted(look.model("model"), look.batch(torch.arange(4)).images, look.batch(torch.arange(4, 6)).images)


def test_a_call_explains_the_classes_that_the_trained_network_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noting, "seen", [])
    model, images = trained(), torch.randn(5, 3, 4, 4)
    randomisation_correlations(model, images, Noting(), batch_size=3, seed=1)
    check_noted(model, *images.split(3))


def test_a_call_under_inference_mode_finds_the_same() -> None:
    model, images = trained(), torch.randn(5, 3, 4, 4)
    expected = randomisation_correlations(model, images, InputGradient())
    with torch.inference_mode():
        found = randomisation_correlations(model, images, InputGradient())
    torch.testing.assert_close(found, expected)


def test_from_end_to_end(places: list[str]) -> None:
    """Noisy copies are the same for all models: SmoothGrad of an unchanged model would correlate perfectly with itself."""
    run = tiny(places, "saliency=smoothgrad", "saliency.samples=2")
    record = ensure(run)
    metrics = record["metrics"]
    assert record["images"] == 6
    assert metrics["randomised"] == list(range(10))
    assert record["layers"][:3] == ["untouched", "linear", "features.conv8 and features.norm8"]
    assert (metrics["correlation"][0], metrics["correlation/std"][0]) == (1, 0)
    assert all(abs(value) < 0.98 for value in metrics["correlation"][1:])
    assert metrics["test/correlation"] == metrics["correlation"][-1]
    run.record_path.unlink()
    assert ensure(run)["metrics"] == metrics == read_record(run.record_path)["metrics"]
