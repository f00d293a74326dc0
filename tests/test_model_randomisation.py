"""Model randomisation: which layers, what they become, and what is left of the maps."""

import copy
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from gradexp import layers
from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.record import read_record
from gradexp.engine.run import Paths, Run
from gradexp.evaluate.model_randomisation import layers_from_output, randomise, rank_correlation
from gradexp.models.vgg import VGG


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
    expected = [
        float(stats.spearmanr(a.abs().flatten(), b.abs().flatten()).statistic) for a, b in zip(first, second, strict=True)
    ]
    torch.testing.assert_close(found[:3], torch.tensor(expected[:3], dtype=torch.float64))
    assert float(found[1]) == pytest.approx(1)
    assert float(found[3]) == 0  # of a constant map nothing is left


def test_from_end_to_end(tmp_path: Path) -> None:
    """Noisy copies are the same for all models: SmoothGrad of an unchanged model would correlate perfectly with itself."""
    words = ["experiment=model_randomisation", "scale=quick", "scale.width=0.04", "logger=none", "trainer.threads=1"]
    words += ["saliency=smoothgrad", "saliency.samples=2", "evaluate.images=6", "evaluate.batch_size=4"]
    words += ["+upstream.model.optim.passes=1", f"paths.results={tmp_path}/results", f"paths.outputs={tmp_path}/outputs"]
    config = compose_run(words)
    run = Run(config, Paths.of(config))
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
