"""What users hand to the library: networks with in-place operations, masks, maps of their own, images of another kind."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradexp import FullGrad, accelerate, evaluate, full_gradient
from gradexp.base.errors import UserError
from gradexp.data.digits import Digits
from gradexp.data.sources import Split
from gradexp.evaluate.pixel_perturbation import PixelPerturbation
from gradexp.saliency import SmoothFullGrad
from gradexp.saliency.method import Saliency
from gradexp.training.optim import Optim

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(*, inplace: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(inplace), nn.Flatten(), nn.Linear(216, 5)]
    return nn.Sequential(*layers).double().eval()


def test_an_output_that_is_a_view_of_a_hidden_tensor_may_be_changed_in_place() -> None:
    """instance_norm returns one; its bias-gradients were lost behind an in-place ReLU."""
    plain, changed = network(inplace=False), network(inplace=True)
    assert FullGrad().completeness_error(changed, IMAGES).max() < 1e-12
    torch.testing.assert_close(FullGrad()(changed, IMAGES), FullGrad()(plain, IMAGES))


class Moving(nn.Module):
    """Two convolutions with biases; what is between them moves pixels."""

    def __init__(self, move: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.move = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1), move

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.move(self.first(images).relu())).relu().mean((2, 3))


def overwritten(maps: Tensor) -> Tensor:
    copy = maps.clone()
    copy[:] = maps.flip(3)
    return copy


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda maps: maps.flip(-1),
    "rolled": lambda maps: maps.roll(3, 2),
    "rolled and rolled on": lambda maps: torch.roll(maps.roll((3, -1), (2, 3)), dims=(2, 3), shifts=(3, -1)),
    "rolled twice and back once": lambda maps: maps.roll(3, 2).roll(3, 2).roll(-3, 2),
    "rolled twice at once and back once": lambda maps: maps.roll((1, 1), (2, 2)).roll(-1, 2),
    "rolled both ways and back in one": lambda maps: maps.roll(3, 2).roll(2, 3).roll(-3, 2),
    "rolled, flipped, rolled back": lambda maps: maps.roll(3, 2).flip(3).roll(-3, 2),
    "rolled, column by column, rolled back": lambda maps: (
        maps.roll(3, 2).transpose(2, 3).flatten(2).unflatten(2, (8, 8)).roll(-3, 2)
    ),
    "rolled and rolled back as windows": lambda maps: maps.roll(3, 2).unflatten(2, (2, 4)).roll(-3, 3).flatten(2, 3),
    "rolled, beside a gate that is not": lambda maps: maps.roll(3, 2) + maps.mean((2, 3), keepdim=True),
    "rolled, beside a mean over rows": lambda maps: maps.roll(3, 2) - maps.mean(2, keepdim=True),
    "written over by what is rolled": lambda maps: maps.clone().copy_(maps.roll(3, 2)),
    "written over by what is flipped": overwritten,
    "rolled by two distances": lambda maps: maps.roll(3, 2) + maps.roll(2, 2),
    "column by column": lambda maps: maps.transpose(2, 3).flatten(2).unflatten(2, (8, 8)),
}


@pytest.mark.parametrize("name", MOVES)
def test_terms_whose_pixels_were_moved_are_on_no_map(name: str) -> None:
    """They would be drawn where the pixels are no longer."""
    model = Moving(MOVES[name]).double().eval()
    full, still = full_gradient(model, IMAGES, 0), full_gradient(Moving(lambda maps: maps).double().eval(), IMAGES, 0)
    assert {"first", "second"} <= still.planes().keys()
    assert "first" in full.planes() and "second" not in full.planes()
    assert full.error().max() < 1e-12
    torch.testing.assert_close(full.outside(), full.biases["second"].sum((1, 2, 3)))


PUT_BACK: dict[str, Callable[[Tensor], Tensor]] = {
    "both ways at once": lambda maps: maps.roll((3, 1), (2, -1)).tanh().roll((7, 5), (3, 2)),
    "both ways, one at a time": lambda maps: maps.roll((3, 1), (2, 3)).tanh().roll(-1, 3).roll(-3, 2),
    "in two steps": lambda maps: maps.roll(np.int64(3), 2).tanh().roll(-1, 2).roll(-2, 2),
    "as windows in between": lambda maps: maps.roll(3, 2).unflatten(2, (2, 4)).tanh().flatten(2, 3).roll(-3, 2),
    "all the way round": lambda maps: maps.roll(8, 2),
    "beside a gate": lambda maps: (maps.roll(3, 2) * maps.mean((2, 3), keepdim=True)).roll(-3, 2),
    "a gate's channels": lambda maps: maps * maps.mean((2, 3)).roll(1, 1)[:, :, None, None],
    "channels": lambda maps: maps.roll(1, 1),
    "beside what stayed": lambda maps: maps.roll(1, 2) + maps,
    "beside what stayed, in place": lambda maps: maps.roll(1, 2).add_(maps),
}


@pytest.mark.parametrize("name", PUT_BACK)
def test_pixels_that_were_rolled_back_are_in_their_places(name: str) -> None:
    full = full_gradient(Moving(PUT_BACK[name]).double().eval(), IMAGES, 0)
    assert {"first", "second"} <= full.planes().keys() and "move" not in full.planes() and "tanh" not in full.planes()


class Attending(nn.Module):
    """Attention over the 64 tokens of a map, of which queries or keys may be rolled."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.rolled = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5), (queries, keys)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.first(images).flatten(2).transpose(1, 2)
        queries, keys = (tokens.roll(by, 1) for by in self.rolled)
        turned = queries.roll(1, -1)  # features, as rotary embeddings turn them
        return self.last((turned @ keys.mT).softmax(-1) @ keys).tanh().mean(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("queries", "is_there"), [(0, True), (5, False)])
@pytest.mark.parametrize("keys", [0, 5])
def test_attention_is_where_its_queries_are(queries: int, keys: int, is_there: bool) -> None:
    full = full_gradient(Attending(queries, keys).double().eval(), IMAGES, 0)
    assert ("last" in full.planes()) == is_there
    assert full.error().max() < 1e-12


def test_a_product_with_a_gate_is_where_the_map_is() -> None:
    model = Moving(lambda maps: torch.einsum("bc,bchw->bchw", maps.mean((2, 3)), maps.roll(3, 2)))
    assert full_gradient(model.double().eval(), IMAGES, 0).planes().keys() == {"first"}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_maps_of_low_precision_are_summed_in_float32(precision: torch.dtype) -> None:
    """Pixels that tie would be removed in an order that the network did not choose."""
    model, images = network(inplace=False).to(precision), torch.randn(1, 3, 8, 8).to(precision)
    saliency = FullGrad()(model, images)
    assert saliency.dtype == torch.float32
    assert saliency.unique().numel() > 0.9 * saliency.numel()


def test_a_mean_of_maps_of_low_precision_is_as_precise_as_one_map() -> None:
    """Copies without noise: a sum of a hundred in bfloat16 is off by per cents."""
    model, images = network(inplace=False).to(torch.bfloat16), IMAGES.to(torch.bfloat16)
    one, mean = FullGrad()(model, images), SmoothFullGrad(samples=100, sigma=0.0)(model, images)
    torch.testing.assert_close(mean, one, rtol=2e-3, atol=2e-3)


class Careless(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()


class Closed(torch.optim.SGD):
    def step(self) -> None:  # type: ignore[override]
        super().step()


class Named(torch.optim.SGD):
    def step(self, function: Any = None) -> None:  # type: ignore[override]
        super().step(function)


class Reading(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure().item() == 0


SETTINGS: Any = {"batch_size": 1, "schedule": lambda progress: 1.0, "passes": 1, "steps": None}


@pytest.mark.parametrize(
    ("kind", "what"), [(Careless, "does not call its closure"), (Closed, "takes no `closure`"), (Named, "takes no `closure`")]
)
def test_an_optimizer_calls_its_closure(kind: type[torch.optim.SGD], what: str) -> None:
    with pytest.raises(UserError, match=rf"optim.optimizer: {kind.__name__}\.step {what}, which computes the"):
        Optim(optimizer=partial(kind, lr=0.1), **SETTINGS)


def test_an_optimizer_may_read_the_loss() -> None:
    Optim(optimizer=partial(Reading, lr=0.1), **SETTINGS)


def test_a_schedule_of_null_is_a_constant_learning_rate() -> None:
    weight = nn.Parameter(torch.ones(1))
    optim = Optim(batch_size=1, optimizer=partial(torch.optim.SGD, lr=0.25), schedule=None, passes=1, steps=None)
    optimizer, schedule = optim.build([weight], total_steps=3)
    for _ in range(3):
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    assert weight.item() == 0.25


class Untested(Digits):
    def splits(self) -> dict[str, Split]:
        return {"train": super().splits()["train"]}


def test_a_data_set_has_both_splits(tmp_path: Path) -> None:
    sizes: Any = {"classes": 10, "channels": 3, "size": 32, "crop": 0, "seed": 0, "root": tmp_path, "cache": tmp_path}
    data = Untested(name="digits", per_class=1, flip=False, normalise="none", validation=None, **sizes)
    with pytest.raises(UserError, match=r"data=digits: its splits\(\) have train, and no test; add it"):
        data.test_loader(batch_size=1, device="cpu")


class Shaped(Saliency):
    def map(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return images[:, 0]


def test_a_map_of_another_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"Shaped: map returned \(2, 8, 8\), expected \(B, 1, H, W\) = \(2, 1, 8, 8\)"):
        Shaped()(network(inplace=False), IMAGES)


def test_settings_come_before_the_network() -> None:
    with pytest.raises(UserError, match=r"takes settings by their names, and then the network: FullGrad\(\)\(model, images\)"):
        FullGrad(network(inplace=False))  # type: ignore[misc]


def test_a_misspelt_filling_is_refused_before_maps_are_computed() -> None:
    wrong: Saliency = Shaped()  # which would fail
    with pytest.raises(UserError, match=r"^fill=grey: it must be image_mean, imputed or a number$"):
        evaluate.perturb_pixels(network(inplace=False), IMAGES, wrong, fill="grey")
    with pytest.raises(UserError, match=r"^evaluate\.fill=grey: it must be black, image_mean, imputed or a number$"):
        PixelPerturbation(fractions=[0.1], order="least", fill="black", readings={"a": {"fill": "grey"}})


def test_activations_are_not_called_slow(caplog: pytest.LogCaptureFixture) -> None:
    accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Tanh(), nn.Dropout2d(), nn.Softmax(1)))
    assert not caplog.records


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 8, 8).bool(), torch.ones(2, 8, 8).bool(), torch.ones(2, 1, 8, 8)])
def test_a_mask_has_one_truth_value_for_each_pixel(mask: Tensor) -> None:
    with pytest.raises(UserError, match=r"give bool of shape \(2, 1, 8, 8\)"):
        evaluate.remove(IMAGES, mask, 0.0)


def test_images_of_another_precision_or_with_other_channels_are_refused() -> None:
    model = network(inplace=False)
    with pytest.raises(UserError, match=r"the images are torch.float32, the model's parameters torch.float64: give images.to"):
        FullGrad()(model, IMAGES.float())
    with pytest.raises(UserError, match="the images have 1 channels, the model takes 3"):
        full_gradient(model, IMAGES[:, :1], 0)
