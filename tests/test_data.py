"""Sources, subsets and the on-device loader."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.data import sources, subsets
from gradexp.data.cifar10 import CIFAR10
from gradexp.data.cifar100 import CIFAR100
from gradexp.data.digits import Digits
from gradexp.data.imagenet import ImageNet
from gradexp.data.loader import TensorLoader, TrainingStream
from gradexp.data.parquet import Layout
from gradexp.data.sources import Split
from gradexp.engine import compose
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.run import ROOT, Paths

LAYOUT = Layout("toy", "Toy", classes=2, channels=3, size=8, image_column="img", label_column="label", torchvision="CIFAR10")


def png(pixels: np.ndarray) -> dict[str, Any]:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def write(root: Path, split: str, labels: list[int], *, columns: tuple[str, str] = ("img", "label"), size: int = 8) -> Path:
    """A parquet file in Hub layout whose pixels are a function of split, label and row."""
    rng = np.random.default_rng(len(split))
    images = [png(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in labels]
    file = root / "toy" / f"{split}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({columns[0]: images, columns[1]: labels}), file)
    return file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write(tmp_path, split, [0, 1, 0, 1, 1, 0])
    return tmp_path


def test_parquet_is_read_and_converted_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sources.load(LAYOUT, root, root / "cache")
    again = sources.load(LAYOUT, root, root / "cache")
    assert capsys.readouterr().out.count("converting") == 1
    assert first["train"].images.shape == (6, 3, 8, 8)
    assert isinstance(again["train"].images, np.memmap)
    assert first["train"].fingerprint == again["train"].fingerprint != first["test"].fingerprint


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    prints = []
    for name in ("one", "two"):
        folder = tmp_path / name
        for split in ("train", "test"):
            file = write(folder, split, [0, 1, 0, 1])
            table = pq.read_table(file)
            pq.write_table(table.take([2, 0, 3, 1]) if name == "two" else table, file)
        prints.append(sources.load(LAYOUT, folder, folder / "cache")["train"].fingerprint)
    assert prints[0] == prints[1]


def test_damaged_cache_is_made_again(root: Path) -> None:
    before = sources.load(LAYOUT, root, root / "cache")["train"].fingerprint
    (array,) = (root / "cache").rglob("train_images.npy")
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    assert sources.load(LAYOUT, root, root / "cache")["train"].fingerprint == before


def test_a_process_verifies_a_data_set_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, its check and its upstream runs open the same files; the second time costs no reading."""
    first = sources.load(LAYOUT, root, root / "cache")
    seen: list[Path] = []
    digest = sources.sha256
    monkeypatch.setattr(sources, "sha256", lambda file: seen.append(file) or digest(file))  # type: ignore[func-returns-value]
    assert sources.load(LAYOUT, root, root / "cache") is first
    assert not seen
    (root / "cache" / "data").rename(root / "cache" / "moved")
    assert sources.load(LAYOUT, root, root / "cache") is not first
    assert seen


def damaged(root: Path, case: str) -> None:
    file = root / "toy" / "train-00000-of-00001.parquet"
    if case == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "column":
        write(root, "train", [0, 1], columns=("img", "lable"))
    elif case == "range":
        write(root, "train", [0, 1, 2])
    elif case == "size":
        write(root, "train", [0, 1], size=9)
    elif case == "image":
        pq.write_table(pa.table({"img": [{"bytes": b"nonsense", "path": None}], "label": [0]}), file)
    elif case == "class":
        write(root, "train", [0, 0])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "train-00000-of-00001.parquet can't be used"),
        ("column", "column"),
        ("range", "label 2 is outside 0..1"),
        ("size", "9x9 pixels, not 8x8"),
        ("image", "row 0 holds no readable image"),
        ("class", "no image of class 1"),
    ],
)
def test_damage_is_an_error_that_names_file_and_mend(root: Path, case: str, message: str) -> None:
    damaged(root, case)
    with pytest.raises(UserError, match=message) as caught:
        sources.load(LAYOUT, root, root / "cache")
    assert "etch" in str(caught.value)  # "Fetch the file again" / "fetch the data set again"
    assert not list((root / "cache").rglob("*.npy"))


def test_no_source_lists_all_that_was_tried(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        sources.load(LAYOUT, tmp_path / "nowhere", tmp_path / "cache")
    for part in ("parquet", "torchvision's files", "download", "GRADEXP_DATA", "does not exist"):
        assert part in str(caught.value)


def as_torchvision(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    """torchvision's CIFAR10 with a download of our own, which may fail half-way, or leave files that can't be read."""

    class Fake:
        base_folder = "fake"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            file = Path(root) / "fake" / "batch"
            if download and not file.exists():
                file.parent.mkdir()
                (Path(root) / "archive.tar.gz").write_bytes(b"half")
                if fails == "half-way":
                    raise RuntimeError("connection reset")
                file.write_bytes(b"half" if fails == "unreadable" else b"whole")
            if not file.exists() or file.read_bytes() != b"whole":
                raise RuntimeError("Dataset not found or corrupted")
            self.data = np.random.default_rng(train).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
            self.targets = [0, 1, 1, 0]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)


@pytest.mark.parametrize("there", [True, False])
def test_torchvision_files_are_read_or_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    as_torchvision(monkeypatch)
    if there:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "batch").write_bytes(b"whole")
    splits = sources.load(LAYOUT, tmp_path, tmp_path / "cache")
    assert splits["train"].images.shape == (4, 3, 8, 8)
    assert sorted(splits["train"].labels) == [0, 0, 1, 1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "fake"]


@pytest.mark.parametrize("fails", ["half-way", "unreadable"])
def test_a_failed_download_leaves_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    as_torchvision(monkeypatch, fails)
    with pytest.raises(UserError, match=r"torchvision's download into .*data \((connection reset|Dataset not found)"):
        sources.load(LAYOUT, root, tmp_path / "cache")
    assert not list(root.iterdir())
    as_torchvision(monkeypatch)
    assert sources.load(LAYOUT, root, tmp_path / "cache")


def test_files_that_a_killed_download_left_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_torchvision(monkeypatch)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "batch").write_bytes(b"half")
    (tmp_path / "fake" / "notes.txt").write_text("of the user's")
    sources.load(LAYOUT, tmp_path, tmp_path / "cache")
    assert (tmp_path / "fake" / "batch").read_bytes() == b"whole"
    assert (tmp_path / "fake" / "notes.txt").exists()


def test_an_empty_data_root_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the repository, below which a failed download would leave a folder."""
    for cached in (compose._compose, compose._by_hydra, compose._sources):  # a process reads its environment once
        cached.cache_clear()
    monkeypatch.setenv("GRADEXP_DATA", "")
    for words in ([], ["paths.data="], ["paths.data=''"]):
        assert Paths.of(compose_run(["experiment=teacher", *words])).data == ROOT / "data"
    monkeypatch.delenv("GRADEXP_DATA")
    assert Paths.of(compose_run(["experiment=teacher"])).data == ROOT / "data"


# --- subsets ----------------------------------------------------------------------------------------------

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 20))


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_subsets_are_nested_and_balanced(seed: int) -> None:
    chosen = [set(subsets.nested(LABELS, per_class=k, seed=seed)) for k in (1, 5, 20)]
    assert chosen[0] < chosen[1] < chosen[2] == set(range(80))
    for k, subset in zip((1, 5, 20), chosen, strict=True):
        assert (np.bincount(LABELS[list(subset)]) == k).all()


def test_subsets_depend_on_the_seed_and_on_nothing_else() -> None:
    one, same, other = (subsets.nested(LABELS, per_class=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert subsets.fingerprint(one) == subsets.fingerprint(same) != subsets.fingerprint(other)


def test_impossible_subsets_are_errors() -> None:
    with pytest.raises(UserError, match="per_class=21"):
        subsets.nested(LABELS, per_class=21, seed=0)


def test_a_validation_split_is_balanced_and_disjoint() -> None:
    kept, held = subsets.split_off(LABELS, fraction=0.25, seed=0)
    assert sorted([*kept, *held]) == list(range(80))
    assert (np.bincount(LABELS[held]) == 5).all()


# --- loader -----------------------------------------------------------------------------------------------


def split(count: int = 10, size: int = 6) -> Split:
    images = np.random.default_rng(1).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Split(images, np.arange(count) % 3)


def loader(data: Split, batch_size: int = 4, **options: Any) -> TensorLoader:
    statistics = {"mean": torch.tensor([0.5, 0.4, 0.3]), "std": torch.tensor([0.2, 0.3, 0.4])}
    return TensorLoader(data, np.arange(len(data.labels)), batch_size=batch_size, **statistics, **options)


def test_images_are_normalised() -> None:
    data = split()
    (batch,) = loader(data, batch_size=10)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    expected = (data.images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(batch.images, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.view.eq(0).all()


def test_every_pass_shows_each_image_once_in_a_new_order() -> None:
    shuffled = loader(split(), shuffle=True)
    passes = [torch.cat([batch.row for batch in shuffled.batches(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert sorted(passes[0]) == list(range(10))
    assert passes[0] != passes[1]
    assert passes[0] == passes[2]


def test_views_are_crops_and_flips_of_the_padded_image() -> None:
    data = split()
    seeing = loader(data, batch_size=10, shuffle=True, flip=True, crop=2, seed=3)
    assert seeing.views == 2 * 5 * 5
    seen = set()
    plain = loader(data, batch_size=10)
    for epoch in range(20):
        (batch,) = seeing.batches(epoch)
        for image, row_, view in zip(batch.images, batch.row, batch.view.tolist(), strict=True):
            mirrored, row, column = view // 25, view // 5 % 5, view % 5
            padded = np.pad(data.images[row_], ((0, 0), (2, 2), (2, 2)))
            window = padded[:, row : row + 6, column : column + 6]
            window = window[:, :, ::-1] if mirrored else window
            expected = torch.tensor(window.copy()) * plain.scale - plain.shift
            torch.testing.assert_close(image, expected)
            seen.add(view)
    assert len(seen) > 45


def test_a_lone_image_joins_the_batch_before_it() -> None:
    sizes = [len(batch.labels) for batch in loader(split(9), shuffle=True)]
    assert sizes == [4, 5]
    assert [len(batch.labels) for batch in loader(split(9))] == [4, 4, 1]
    with pytest.raises(UserError, match="per_class"):
        loader(split(1), shuffle=True)


def test_a_stream_can_be_taken_up_anywhere() -> None:
    whole = [batch.row.tolist() for batch in TrainingStream(loader(split(), shuffle=True, flip=True), 8)]
    assert len(whole) == 8
    for stop in (1, 3, 5):
        first = TrainingStream(loader(split(), shuffle=True, flip=True), 8)
        for _ in zip(range(stop), first, strict=False):
            pass
        second = TrainingStream(loader(split(), shuffle=True, flip=True), 8)
        second.load_state_dict({"step": stop})
        assert [batch.row.tolist() for batch in second] == whole[stop:]


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"crop": 1}, {"flip": True, "crop": 2}, {"shuffle": False}], ids=str)
@pytest.mark.parametrize("count", [3, 8, 9, 10])  # less than a batch, whole batches, a lone image, a rest of two
def test_the_views_that_are_foretold_are_those_that_are_shown(count: int, options: dict[str, Any]) -> None:
    """After any number of steps, in the middle of a pass too; each key is of one image and one view."""
    images = loader(split(count), **{"shuffle": True, **options})
    for steps in range(1, 3 * len(images) + 1):
        shown = {pair for batch in TrainingStream(images, steps) for pair in zip(*map(Tensor.tolist, batch[2:4]), strict=True)}
        keys = images.visited(steps)
        assert [(key // images.views, key % images.views) for key in keys.tolist()] == sorted(shown)
        assert torch.equal(images.key(keys // images.views, keys % images.views), keys)


# --- data sets --------------------------------------------------------------------------------------------


def digits(tmp_path: Path, **changes: Any) -> Digits:
    options = {
        "name": "digits",
        "classes": 10,
        "channels": 3,
        "size": 32,
        "per_class": None,
        "flip": False,
        "crop": 0,
        "normalise": "standard",
        "validation": None,
    }
    return Digits(**{**options, **changes}, root=tmp_path, cache=tmp_path, seed=0)  # type: ignore[arg-type]


def test_digits_need_no_files(tmp_path: Path) -> None:
    data = digits(tmp_path)
    facts = data.fingerprint()
    assert facts["train_images"] + facts["test_images"] == 1797
    batches = list(data.train_loader(batch_size=512, device="cpu", augment=False))
    pixels = torch.cat([batch.images for batch in batches])
    assert pixels.shape[1:] == (3, 32, 32)
    assert abs(pixels.mean().item()) < 1e-4
    assert abs(pixels.std().item() - 1) < 1e-3


def test_raw_pixels_stay_between_0_and_1(tmp_path: Path) -> None:
    (batch, *_) = digits(tmp_path, normalise="none").test_loader(batch_size=16, device="cpu")
    assert 0 <= batch.images.min() <= batch.images.max() <= 1


@pytest.mark.parametrize("normalise", ["standard", "none"])
def test_black_is_what_the_loader_makes_of_a_black_image(
    tmp_path: Path, normalise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each channel, whose mean and deviation are its own."""
    coloured = (split().images // np.array([1, 2, 4])[:, None, None]).astype(np.uint8)
    made = {"train": Split(coloured, np.arange(10)), "test": Split(np.zeros((1, 3, 6, 6), np.uint8), np.arange(1))}
    monkeypatch.setattr(Digits, "splits", lambda _: made)
    data = digits(tmp_path, normalise=normalise)
    (batch,) = data.test_loader(batch_size=1, device="cpu")
    assert data.black.shape == (3, 1, 1)
    torch.testing.assert_close(batch.images, data.black.expand(1, 3, 6, 6))
    assert len(data.black.unique()) == (3 if normalise == "standard" else 1)


def test_a_validation_split_takes_the_place_of_the_test_set(tmp_path: Path) -> None:
    whole, held = digits(tmp_path).fingerprint(), digits(tmp_path, validation=0.2, per_class=5).fingerprint()
    assert held["test"] == whole["train"]  # cut from the training set
    assert held["train_images"] == 50
    assert 0.19 < held["test_images"] / whole["train_images"] < 0.21


def test_wrong_choices_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="standard or none"):
        digits(tmp_path, normalise="zca")
    with pytest.raises(UserError, match=r"only_classes=\[1, 1\] names a class twice"):
        digits(tmp_path, classes=2, only_classes=[1, 1])


def test_cifar10_has_the_columns_of_the_hub() -> None:
    assert (CIFAR10.layout.image_column, CIFAR10.layout.label_column) == ("img", "label")


# --- what classes are called ------------------------------------------------------------------------------


def test_names_follow_the_labels_that_are_kept(tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "x", "channels": 3, "size": 32, "flip": False, "crop": 0, "normalise": "none", "seed": 0}
    options |= {"per_class": None, "validation": None, "root": tmp_path, "cache": tmp_path}
    assert CIFAR10(classes=10, **options).class_names([9, 0]) == ["truck", "airplane"]
    assert CIFAR10(classes=2, only_classes=[5, 3], **options).class_names([0, 1]) == ["dog", "cat"]
    assert Digits(classes=10, **options).class_names([7]) == ["7"]


def test_the_classes_of_cifar100_are_those_of_its_superclasses(tmp_path: Path) -> None:
    """The target of Table 2.3 at scale=cpu is four superclasses, named in the data set's paper."""
    words = ["experiment=jacobian_transfer", "scale=cpu"]
    data = plan(words).config["data"]
    target = CIFAR100(**{key: value for key, value in data.items() if key != "_target_"}, root=tmp_path, cache=tmp_path, seed=0)
    outdoor = {"bridge", "castle", "house", "road", "skyscraper", "cloud", "forest", "mountain", "plain", "sea"}
    household = {"bed", "chair", "couch", "table", "wardrobe", "clock", "keyboard", "lamp", "telephone", "television"}
    assert set(target.class_names(range(20))) == outdoor | household
    assert len(set(target.names())) == 100


def test_imagenets_names_are_given_only_where_its_classes_are_all_there(tmp_path: Path) -> None:
    data = plan(["experiment=pixel_perturbation", "scale=paper"]).config["data"]
    options = {key: value for key, value in data.items() if key != "_target_"}
    place: dict[str, Any] = {"root": tmp_path, "cache": tmp_path, "seed": 0}
    assert ImageNet(**options, **place).class_names([0, 999]) == ["tench", "toilet tissue"]
    assert ImageNet(**{**options, "classes": 2}, **place).class_names([1]) == ["1"]
