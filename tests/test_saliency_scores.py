"""The tests of saliency maps, on images of four pixels worked by hand; ROAR's data and its maps on disk."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from fakes import upstream_of
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.data.digits import Digits
from gradexp.data.loader import Batch, TensorLoader
from gradexp.data.removal import MANIFEST, Removal
from gradexp.data.sources import Split
from gradexp.engine.assemble import make_saliency
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import ensure
from gradexp.engine.evaluation import Evaluation
from gradexp.engine.run import ROOT, Paths, Run
from gradexp.evaluate.digit_flip import DigitFlip
from gradexp.evaluate.pixel_perturbation import PixelPerturbation
from gradexp.saliency import Saliency
from gradexp.tasks import saliency_maps

BLACK = torch.zeros(1, 1, 1)


class Weights(nn.Module):
    """Logits (w · x, -w · x / 2) of pictures of four pixels."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.w = torch.tensor(weights, dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        value = images.flatten(1) @ self.w
        return torch.stack([value, -value / 2], 1)


@dataclass(frozen=True, kw_only=True)
class Given(Saliency):
    """These maps, for one class or for each."""

    maps: dict[int | None, list[float]]

    def map(self, model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
        values = self.maps[None if labels is None else int(labels[0])]
        return torch.tensor(values).view(1, 1, 2, 2).expand(len(images), 1, 2, 2)


def batch(*images: list[float], labels: list[int] | None = None) -> Batch:
    count = len(images)
    return Batch(
        torch.tensor(images).view(count, 1, 2, 2), torch.tensor(labels or [0] * count), torch.arange(count), torch.zeros(count)
    )


def changes(order: str, maps: list[float], *, fractions: list[float], fill: str | float = "black") -> list[list[float]]:
    """f = 1 x₁ + 2 x₂ + 3 x₃ + 4 x₄ of an image of ones and of one of -2s, whose largest logit is the second."""
    test = PixelPerturbation(fractions=fractions, order=order, fill=fill)
    model, method = Weights(1, 2, 3, 4), Given(maps={None: maps})
    found = test(model, method, batch([1.0] * 4, [-2.0] * 4), black=BLACK, seed=0)
    assert list(found) == [f"output_change@removed={fraction:g}" for fraction in fractions]
    return [[round(value, 5) for value in values.tolist()] for values in found.values()]


def test_pixel_perturbation_by_hand() -> None:
    """f(1) = 10: without pixel 1 it is 9, without 1 and 2 it is 7, without 4 it is 6; nothing and everything."""
    salience = [0.1, 0.2, 0.3, 0.4]
    assert changes("least", salience, fractions=[0, 0.25, 0.5, 1]) == [[0, 0], [0.1, 0.1], [0.3, 0.3], [1, 1]]
    assert changes("most", salience, fractions=[0, 0.25, 0.5, 1]) == [[0, 0], [0.4, 0.4], [0.7, 0.7], [1, 1]]
    assert changes("least", salience[::-1], fractions=[0.25]) == [[0.4, 0.4]]
    assert changes("least", salience, fractions=[0.5], fill=3.0) == [[0.6, 0.75]]  # 1 -> 3 and -2 -> 3: change of 2·3, 5·3
    assert changes("least", salience, fractions=[0.5], fill="image_mean") == [[0, 0]]


def test_the_mean_colour_is_fill_0_of_normalised_images() -> None:
    """What a mask of zeros and ones, multiplied by normalised images, does."""
    assert changes("least", [0.1, 0.2, 0.3, 0.4], fractions=[0.25, 0.5], fill=0) == [[0.1, 0.1], [0.3, 0.3]]


def scored(**options: Any) -> dict[str, Tensor]:
    test = PixelPerturbation(**{"fractions": [0.25, 0.5, 1.0], "order": "least", "fill": "black", **options})
    method = Given(maps={None: [0.1, 0.2, 0.3, 0.4]})
    torch.manual_seed(0)
    return test(Weights(1, 2, 3, 4), method, batch([1.0] * 4, [3.0, -1.0, 2.0, 0.5]), black=torch.full((1, 1, 1), -0.5), seed=0)


def test_the_mean_height_of_a_curve_by_hand() -> None:
    """Trapezoids of (0.25, a), (0.5, b), (1, c): over fractions of width 1/4 and 1/2, over logarithms of the same width."""
    plain = scored()
    assert not any("area" in name for name in plain)
    a, b, c = plain.values()
    linear, log = (scored(area=kind)["output_change_area"] for kind in ("linear", "log"))
    torch.testing.assert_close(linear, (((a + b) / 2 * 0.25 + (b + c) / 2 * 0.5) / 0.75).double())
    torch.testing.assert_close(log, ((a + 2 * b + c) / 4).double())
    assert linear.shape == (2,)
    with pytest.raises(UserError, match=r"evaluate\.area=linear"):
        scored(area="log", fractions=[0, 0.5])


def test_readings_give_the_values_of_separate_runs() -> None:
    changed: dict[str, dict[str, Any]] = {
        "mean": {"fill": 0},
        "most": {"order": "most"},
        "both": {"order": "most", "fill": 2.0},
    }
    found = scored(area="log", readings=changed)
    alone = {"": scored(area="log")} | {f"{name}/": scored(area="log", **options) for name, options in changed.items()}
    assert len(found) == 16
    for prefix, expected in alone.items():
        for name, values in expected.items():
            torch.testing.assert_close(found[prefix + name], values)
    assert not torch.equal(found["mean/output_change_area"], found["output_change_area"])
    with pytest.raises(UserError, match=r"evaluate\.readings\.mean\.filling"):
        scored(readings={"mean": {"filling": 0}})
    with pytest.raises(UserError, match=r"evaluate\.order"):
        scored(readings={"mean": {"order": "last"}})


def test_ties_are_ordered_at_random() -> None:
    """Four equal pixels, one goes: a tenth, two, three or four tenths, by the seed; signs count, sizes do not."""
    test = PixelPerturbation(fractions=[0.25], order="least", fill="black")
    model, image = Weights(1, 2, 3, 4), batch([1.0] * 4)
    level = Given(maps={None: [5.0] * 4})
    drawn = {
        round(float(test(model, level, image, black=BLACK, seed=seed)["output_change@removed=0.25"]), 3) for seed in range(40)
    }
    assert drawn == {0.1, 0.2, 0.3, 0.4}
    assert changes("least", [0.0, -9.0, 1.0, 2.0], fractions=[0.25]) == [[0.2, 0.2]]


def test_removed_pixels_are_black_in_the_images_units() -> None:
    test = PixelPerturbation(fractions=[0.25], order="least", fill="black")
    method = Given(maps={None: [0.1, 0.2, 0.3, 0.4]})
    found = test(Weights(1, 2, 3, 4), method, batch([1.0] * 4), black=torch.full((1, 1, 1), -0.5), seed=0)
    assert float(found["output_change@removed=0.25"]) == pytest.approx(0.15)


def test_a_method_is_given_the_black_and_the_deviation_of_the_images() -> None:
    """Those of an image of zeros and one of 255s behind the loader."""
    data, hardware = digits(), SimpleNamespace(device="cpu")
    extremes = Split(np.repeat(np.uint8([0, 255]), 3).reshape(2, 3, 1, 1), np.arange(2))
    mean, std = data.colours
    (seen,) = TensorLoader(extremes, np.arange(2), batch_size=2, mean=mean, std=std)
    config = compose_run(["experiment=pixel_perturbation", "scale=quick", "saliency=integrated_gradients"])
    method = make_saliency(config, data, hardware)  # type: ignore[arg-type]
    torch.testing.assert_close(method.black, seen.images[0])
    torch.testing.assert_close(1 / method.std, seen.images[1] - seen.images[0])


def test_digit_flip_by_hand() -> None:
    """S_0 - S_1 = (3, 2, 1, -1): log-odds 1.5 f = 15 lose pixel 1, then 2, never the pixel that is evidence for class 1."""
    method = Given(maps={0: [3.0, 3.0, 1.0, 0.0], 1: [0.0, 1.0, 0.0, 1.0]})
    images = batch([1.0] * 4, [1.0] * 4, [2.0] * 4, labels=[0, 1, 0])

    def flip(fraction: float) -> list[float]:
        test = DigitFlip(source=0, target=1, fraction=fraction)
        return test(Weights(1, 2, 3, 4), method, images, black=BLACK, seed=0)["log_odds_change"].tolist()

    assert flip(0) == [0, 0]
    assert flip(0.25) == [1.5, 3]
    assert flip(0.5) == [4.5, 9]
    assert flip(1) == [9, 18]  # not pixel 4
    test = DigitFlip(source=0, target=1, fraction=0.5)
    assert test(Weights(1, 2, 3, 4), method, batch([1.0] * 4, labels=[1]), black=BLACK, seed=0) == {}
    with pytest.raises(UserError, match="another class"):
        DigitFlip(source=3, target=3, fraction=0.2)


def test_a_fifth_of_an_mnist_image_is_157_pixels() -> None:
    mask = DigitFlip(source=8, target=3, fraction=0.2).removed(torch.rand(2, 1, 28, 28) + 0.1, 0)
    assert mask.sum((1, 2, 3)).tolist() == [157, 157]


# --- remove and retrain -----------------------------------------------------------------------------------


def store(folder: Path, train: np.ndarray, test: np.ndarray, fingerprint: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, places in (("train", train), ("test", test)):
        np.save(folder / f"{name}.npy", places)
    digests = {f"{name}.npy": sha256(folder / f"{name}.npy") for name in ("train", "test")}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests, "data": fingerprint}))
    return folder


def digits(**changes: Any) -> Digits:
    options = {"name": "digits", "classes": 10, "channels": 3, "size": 32, "flip": False, "crop": 0, "normalise": "standard"}
    places = {"root": ROOT, "cache": ROOT, "seed": 0, "per_class": 2, "validation": None}
    return Digits(**{**options, **places, **changes})


def places_of(data: Digits, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = data.fingerprint()["train_images"], data.fingerprint()["test_images"]
    order = (generator.permuted(np.tile(np.arange(1024), (count, 1)), axis=1) for count in counts)
    train, test = (each.reshape(-1, 1, 32, 32).astype(np.int16) for each in order)
    return train, test


@pytest.mark.parametrize("normalise", ["standard", "none"])
def test_removed_pixels_have_the_mean_colour_and_the_others_their_own(tmp_path: Path, normalise: str) -> None:
    data = digits(normalise=normalise, removal=Removal(fraction=0.25))
    places = places_of(data)
    data.removal.open(store(tmp_path, *places, data.fingerprint()), data.fingerprint())  # type: ignore[union-attr]
    whole = digits(normalise=normalise)
    for split, ranks in zip(("train", "test"), places, strict=True):
        modified, original = (
            next(
                iter(
                    getattr(one, f"{split}_loader")(
                        batch_size=9, device="cpu", **({"augment": False} if split == "train" else {})
                    )
                )
            )
            for one in (data, whole)
        )
        gone = torch.as_tensor(ranks[:9] >= 768).expand_as(original.images)
        assert gone.float().mean() == 0.25
        mean, std = whole.statistics
        colour = ((whole.colours[0] - mean) / std).view(-1, 1, 1).expand_as(original.images)
        torch.testing.assert_close(modified.images[gone], colour[gone], atol=1e-5, rtol=0)
        torch.testing.assert_close(modified.images[~gone], original.images[~gone])


def test_removal_comes_before_augmentation() -> None:
    """A mirrored image is the mirror of the modified image; all that a view shows was modified in the same way."""
    split = Split(np.random.default_rng(0).integers(1, 256, (3, 1, 4, 4), dtype=np.uint8), np.arange(3))
    removed = np.zeros((3, 1, 4, 4), dtype=bool)
    removed[:, :, :, 0] = True
    options: dict[str, Any] = {"batch_size": 3, "mean": torch.zeros(1), "std": torch.ones(1), "flip": True, "crop": 1}
    loader = TensorLoader(split, np.arange(3), removed=removed, fill=torch.tensor([0.5]), **options)
    rows = torch.arange(3)
    centre = 1 * 3 + 1
    plain, mirrored = (loader.batch(rows, torch.full((3,), view)).images for view in (centre, 9 + centre))
    assert (plain[:, :, :, 0] == 0.5).all()
    assert torch.equal(mirrored, plain.flip(3))
    assert loader.fingerprint != TensorLoader(split, np.arange(3), **options).fingerprint


def test_maps_that_are_damaged_or_of_other_images_are_refused(tmp_path: Path) -> None:
    data = digits()
    folder = store(tmp_path, *places_of(data), data.fingerprint())
    Removal(fraction=0.5).open(folder, data.fingerprint())
    with pytest.raises(UserError, match=r"data\.per_class"):
        Removal(fraction=0.5).open(folder, digits(per_class=3).fingerprint())
    with (folder / "test.npy").open("r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff\xff")
    with pytest.raises(UserError, match="computed again"):
        Removal(fraction=0.5).open(folder, data.fingerprint())
    with pytest.raises(UserError, match=r"data\.removal=null"):
        Removal(fraction=0)
    with pytest.raises(UserError, match="experiment=roar"):
        Removal(fraction=0.5).mask("train")


TINY = ["scale=quick", "scale.width=0.04", "logger=none", "trainer.threads=1"]
UPSTREAM = [
    "+upstream.maps.scale.width=0.04",
    "+upstream.maps.upstream.model.optim.passes=1",
    "+upstream.maps.upstream.model.scale.width=0.04",
]


def paths(folder: Path) -> list[str]:
    return [f"paths.results={folder}/results", f"paths.outputs={folder}/outputs"]


def test_the_baseline_of_roar_is_one_run_and_stands_on_no_maps() -> None:
    runs = [plan(["experiment=roar", f"upstream.maps.saliency={name}", "data.removal=null"]) for name in ("random", "gradcam")]
    assert runs[0].config == runs[1].config
    assert not runs[0].upstream


def test_the_seeds_of_roar_share_their_images_and_maps() -> None:
    first, second = (plan(["experiment=roar", "scale=cpu", f"seed={seed}"]) for seed in (0, 1))
    assert first.upstream["maps"].config == second.upstream["maps"].config
    assert first.config["data"] == second.config["data"]
    subsets = [digits(seed=seed, subset_seed=0).fingerprint()["subset"] for seed in (0, 1)]
    assert subsets[0] == subsets[1] == digits().fingerprint()["subset"] != digits(seed=1).fingerprint()["subset"]


def test_roar_from_end_to_end(
    tmp_path: Path, run_py: Callable[..., "subprocess.CompletedProcess[str]"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher, maps, retraining; then maps that are interrupted go on, to the same bytes."""
    done = run_py("experiment=roar", *TINY, *UPSTREAM, "data.per_class=3", "optim.passes=1", "upstream.maps.saliency=random")
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(file.read_text()) for file in (tmp_path / "results/runs/roar").glob("*.json"))
    (maps_record,) = (json.loads(file.read_text()) for file in (tmp_path / "results/runs/saliency_maps").glob("*.json"))
    assert record["upstream"]["maps"]["id"] == maps_record["id"]
    (manifest,) = tmp_path.rglob(MANIFEST)
    assert json.loads(manifest.read_text())["sha256"] == maps_record["sha256"]
    places = np.load(manifest.parent / "train.npy")
    assert places.shape == (30, 1, 32, 32)
    assert (np.sort(places.reshape(30, -1), axis=1) == np.arange(1024)).all()

    test = manifest.parent / "test.npy"
    whole, ranks_of, computed = test.read_bytes(), saliency_maps.ranks_of, list[int]()

    def interrupted(*given: Any) -> Tensor:
        computed.append(given[-2])  # the chunk's number
        if computed == [0, 0, 1]:
            raise KeyboardInterrupt
        return ranks_of(*given)

    monkeypatch.setattr(saliency_maps, "ranks_of", interrupted)
    config = maps_record["config"] | {"paths": compose_run(["experiment=roar", *paths(tmp_path)])["paths"]}
    run = Run(config, Paths.of(config))
    manifest.unlink()
    with pytest.raises(KeyboardInterrupt):
        ensure(run, product=True)
    ensure(run, product=True)
    assert computed == [0, 0, 1, 1, 2]
    assert test.read_bytes() == whole


def test_stored_ranks_are_those_of_the_images_in_the_loaders_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both sides of a chunk's end, and last: the order of |gradient| of the predicted logit of that very image."""
    monkeypatch.setattr(saliency_maps, "CHUNK", 64)
    words = ["experiment=saliency_maps", *TINY, "saliency=input_gradient", "data.per_class=13", *paths(tmp_path)]
    config = compose_run([*words, "+upstream.model.optim.passes=1", "+upstream.model.scale.width=0.04"])
    run = Run(config, Paths.of(config))
    ensure(run)
    look = Evaluation(run, upstream_of(run))
    model, device = look.model("model"), look.hardware.device
    plain = {"train": look.data.train_loader(batch_size=999, device=device, augment=False)}
    for split, loader in {**plain, "test": look.data.test_loader(batch_size=999, device=device)}.items():
        (batch,), stored = loader, np.load(run.folder / f"{split}.npy")
        assert len(stored) == len(batch.images) > 128
        rows = [0, 63, 64, len(stored) - 1]
        images = batch.images[rows].requires_grad_()  # together: of a lone image, rounding decides other ties of max-pooling
        slopes = torch.autograd.grad(model(images).max(1).values.sum(), images)[0].abs().sum(1)
        for row, slope in zip(rows, slopes, strict=True):
            assert stats.spearmanr(stored[row].flatten(), slope.flatten()).statistic > 0.99, (split, row)


def test_a_score_is_a_mean_over_images_with_its_spread(tmp_path: Path) -> None:
    """The record of a FullGrad run says how complete the full-gradients were; the number of images is as asked."""
    words = ["experiment=pixel_perturbation", *TINY, "+upstream.model.optim.passes=1", "evaluate.images=70", *paths(tmp_path)]
    config = compose_run([*words, "evaluate.fractions=[0.01,0.1]"])
    record = ensure(Run(config, Paths.of(config)))
    assert record["images"] == 70
    for prefix in ("", "mean/", "imputed/", "most/"):
        assert record["metrics"][f"test/{prefix}output_change_area/std"] > 0
    assert record["metrics"]["test/completeness_error"] < 1e-4
    assert record["metrics"]["test/output_change@removed=0.1/std"] > 0
    assert set(record["upstream"]) == {"model"}


def test_a_record_has_the_mean_and_the_deviation_of_all_images(tmp_path: Path) -> None:
    """Of 64 and 6 images, the tenth of whose pixels with the smallest gradients becomes black: |f(perturbed) / f(x) - 1|."""
    words = ["experiment=pixel_perturbation", *TINY, "saliency=input_gradient", "+upstream.model.optim.passes=1"]
    words += [
        "+upstream.model.data.per_class=4",
        "evaluate.images=70",
        "evaluate.fractions=[0.1]",
        "evaluate.readings=null",
        *paths(tmp_path),
    ]
    config = compose_run(words)
    run = Run(config, Paths.of(config))
    metrics = ensure(run)["metrics"]
    look = Evaluation(run, upstream_of(run))
    model, images = look.model("model"), look.batch(torch.arange(70)).images.requires_grad_()
    output, top = model(images).max(1)
    slopes = torch.autograd.grad(output.sum(), images)[0].abs().sum(1, keepdim=True)
    least = slopes <= slopes.flatten(1).kthvalue(102).values.view(-1, 1, 1, 1)
    mean, std = look.data.colours
    after = model(torch.where(least, (-mean / std).view(3, 1, 1), images)).gather(1, top[:, None])[:, 0]
    change = (after / output - 1).abs().detach().numpy()
    name = "test/output_change@removed=0.1"
    assert (metrics[name], metrics[f"{name}/std"]) == pytest.approx((change.mean(), change.std(ddof=1)), rel=1e-3)


def test_a_score_of_a_model_that_diverged_is_diverged(tmp_path: Path) -> None:
    """Its table would never be filled otherwise: no map of such a model is finite."""
    huge = ["+upstream.model.optim.optimizer.lr=1e30", "+upstream.model.optim.passes=3"]
    config = compose_run(["experiment=pixel_perturbation", *TINY, *huge, "evaluate.images=70", *paths(tmp_path)])
    record = ensure(Run(config, Paths.of(config)))
    assert (record["status"], record["metrics"]) == ("diverged", {})


def test_the_images_of_a_record_are_those_that_were_scored(tmp_path: Path) -> None:
    """Only the 8s are flipped, though completeness is measured on all images: a mean's standard error needs the first."""
    words = ["experiment=digit_flip", *TINY, "+upstream.model.optim.passes=1", "evaluate.images=70", "saliency=fullgrad_abs"]
    config = compose_run([*words, *paths(tmp_path)])
    assert 0 < ensure(Run(config, Paths.of(config)))["images"] < 20


def test_vgg16_on_imagenet_from_end_to_end(tmp_path: Path) -> None:
    """A folder in ImageNet's layout and a weights file, both made here: the run of scale=paper but for their size."""
    torch.manual_seed(0)
    for number in range(4):
        file = tmp_path / "imagenet" / "val" / f"n0{number % 2}" / f"ILSVRC2012_val_{number:08}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        colours = torch.randint(256, (6, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC).save(file)
    weights = tmp_path / "weights" / "mine.pth"
    weights.parent.mkdir()
    torch.save(torchvision.models.vgg16_bn(weights=None, num_classes=2).state_dict(), weights)
    words = [
        "experiment=pixel_perturbation",
        "scale=paper",
        "data.classes=2",
        "evaluate.readings=null",
        f"paths.data={tmp_path}",
        *paths(tmp_path),
    ]
    words += ["evaluate.fractions=[0.01,0.1]"]
    config = compose_run([*words, "+upstream.model.data.classes=2", "+upstream.model.task.file=mine.pth"])
    record = ensure(Run(config, Paths.of(config)))
    assert record["images"] == 4
    assert record["metrics"]["test/completeness_error"] < 1e-3
    assert 0 < record["metrics"]["test/output_change@removed=0.1"] < float("inf")


def test_the_first_images_are_as_many_as_asked() -> None:
    look = Evaluation.__new__(Evaluation)  # without a run
    look.data, look.hardware = digits(), SimpleNamespace(device="cpu")  # type: ignore[assignment]
    for limit, sizes in ((5, [4, 1]), (8, [4, 4]), (3, [3])):
        assert [len(look.batch(rows).images) for rows in look.first_rows(limit, 4)] == sizes
    assert sum(map(len, look.first_rows(None, 100))) == look.data.fingerprint()["test_images"]
