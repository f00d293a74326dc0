"""Parquet files in the layout of the Hub: which are read, and what is refused before it is taken for a data set."""

import io
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gradexp.base.errors import UserError
from gradexp.data import sources
from gradexp.data.cifar100 import CIFAR100
from gradexp.data.sources import Layout, Split

NAMES = ("maple tree", "sea")
TOY = Layout("toy", "Toy", classes=2, channels=3, size=8, image_column="img", label_column="label", torchvision="CIFAR10")
NAMED = replace(TOY, names=NAMES, images=(4, 4))
LABELS = [0, 1, 0, 1]
INTEGERS = pa.array(LABELS)


def encoded(count: int, seed: int = 0) -> list[bytes]:
    pictures = []
    for pixels in np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        pictures.append(out.getvalue())
    return pictures


def structs(contents: Sequence[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": content, "path": "a.png"} for content in contents])


def write(file: Path, images: pa.Array, labels: pa.Array, names: Sequence[str] | None = None) -> None:
    table = pa.table({"img": images, "label": labels})
    if names is not None:
        features = {"img": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def fill(root: Path, images: pa.Array | None = None, labels: pa.Array = INTEGERS, names: Sequence[str] | None = None) -> Path:
    """A training split of these columns, and an ordinary test split."""
    write(root / "toy" / "train-00000-of-00001.parquet", structs(encoded(4)) if images is None else images, labels, names)
    write(root / "toy" / "test-00000-of-00001.parquet", structs(encoded(4, seed=1)), pa.array(LABELS))
    return root


def loaded(root: Path, layout: Layout = NAMED) -> dict[str, Split]:
    return sources.load(layout, root, root / "cache")


def refused(root: Path, layout: Layout = NAMED) -> str:
    """The message, which is one line."""
    with pytest.raises(UserError) as caught:
        loaded(root, layout)
    assert "\n" not in str(caught.value)
    assert not list(root.rglob("*.npy"))
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------------


def parts(root: Path, *names: str) -> Path:
    """A training split of these files, each of other images, and an ordinary test split."""
    fill(root)
    (root / "toy" / "train-00000-of-00001.parquet").unlink()
    for seed, name in enumerate(names, start=2):
        write(root / "toy" / name, structs(encoded(4, seed)), pa.array(LABELS))
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("train-00000-of-00002-a8b0f6ce37cb4e70.parquet", "train-00001-of-00002-2c59aa5f1fcf4a4c.parquet"),
        ("train-0.parquet", "train-1.parquet"),
    ],
)
def test_complete_sets_of_parts_are_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert len(loaded(parts(tmp_path, *names), TOY)["train"].labels) == 8


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002.parquet"], "holds train-00000-of-00002.parquet: expected parts 0 to 1 of 2"),
        (["train-00001-of-00002.parquet"], "expected parts 0 to 1 of 2"),
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "expected parts 0 to 2 of 3"),
        (["train-00001-of-00001.parquet"], "expected parts 0 to 0 of 1"),
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "holds train more than once"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001-a8b0f6ce37cb4e70.parquet"], "holds train more than once"),
        (["train-00000-of-00001.parquet", "train-00000-of-00001 (1).parquet"], "holds train more than once"),
        (["train-00000-of-00001.parquet", "train-0.parquet"], "holds train more than once"),
        ([], "holds no train-*.parquet, only test-00000-of-00001.parquet"),
    ],
)
def test_incomplete_and_repeated_parts_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    assert message in refused(parts(tmp_path, *names), TOY)


@pytest.mark.parametrize("name", ["train-0.parquet", "train-copy.parquet", "test-0.parquet", "train-00001-of-00002.parquet"])
def test_the_same_file_under_two_names_is_refused(tmp_path: Path, name: str) -> None:
    first = "train-00000-of-00002.parquet" if "of" in name else "train-a.parquet"
    parts(tmp_path, first)
    (tmp_path / "toy" / "test-00000-of-00001.parquet").rename(tmp_path / "toy" / "test-a.parquet")
    (tmp_path / "toy" / name).write_bytes((tmp_path / "toy" / first).read_bytes())
    assert "are the same file" in refused(tmp_path, TOY)


@pytest.mark.parametrize("count", [2, 6])
def test_a_known_data_set_has_its_number_of_images(tmp_path: Path, count: int) -> None:
    fill(tmp_path, structs(encoded(count)), pa.array([0, 1] * (count // 2)))
    assert f"Toy, train: {count} images instead of 4" in refused(tmp_path)
    assert len(loaded(tmp_path, TOY)["train"].labels) == count


def test_splits_without_rows_or_files_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, structs(encoded(1))[:0], INTEGERS[:0])
    assert "train-00000-of-00001.parquet can't be used: it holds no image" in refused(tmp_path)
    (tmp_path / "toy" / "test-00000-of-00001.parquet").unlink()
    assert "holds no test-*.parquet" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", b"PAR1 and nothing of use PAR1"])
def test_files_that_are_not_parquet_are_refused(tmp_path: Path, content: bytes) -> None:
    (fill(tmp_path) / "toy" / "train-00000-of-00001.parquet").write_bytes(content)
    assert "train-00000-of-00001.parquet can't be used" in refused(tmp_path)


def test_damaged_pages_are_refused(tmp_path: Path) -> None:
    """Every stretch of a file overwritten in turn: an error, or images that can't be decoded, but never a traceback."""
    content = (fill(tmp_path) / "toy" / "train-00000-of-00001.parquet").read_bytes()
    for start in range(4, len(content) - 8, len(content) // 12):
        damaged = content[:start] + b"\xff" * 8 + content[start + 8 :]
        (tmp_path / "toy" / "train-00000-of-00001.parquet").write_bytes(damaged)
        try:
            loaded(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "large_binary", "dictionary", "struct"])
def test_images_are_bytes_or_structs_of_bytes(tmp_path: Path, kind: str) -> None:
    contents = encoded(4)
    columns = {
        "binary": pa.array(contents),
        "large_binary": pa.array(contents, pa.large_binary()),
        "dictionary": pa.array(contents).dictionary_encode(),
        "struct": structs(contents),
    }
    expected = loaded(fill(tmp_path / "usual"))["train"].fingerprint
    assert loaded(fill(tmp_path / "other", columns[kind]))["train"].fingerprint == expected


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (pa.array(["a.png"] * 4), "column img holds string, expected encoded images: binary, or struct<bytes"),
        (pa.array([[1, 2]] * 4), "column img holds list<"),
        (pa.array([{"path": "a.png"}] * 4), "column img holds struct<path: string>"),
        (pa.array([7] * 4), "column img holds int64"),
        (structs([*encoded(3), None]), "row 3 holds no bytes of an image"),
        (pa.array([None, *encoded(3)], pa.binary()), "row 0 holds no bytes of an image"),
        (pa.array([None, *structs(encoded(3)).to_pylist()]), "row 0 holds no bytes of an image"),
        (structs([*encoded(3), b""]), "row 3 holds no readable image (it is empty or of an unknown format)"),
        (structs([content[:-40] for content in encoded(4)]), "row 0 holds no readable image"),
    ],
)
def test_other_image_columns_are_described(tmp_path: Path, images: pa.Array, message: str) -> None:
    assert message in refused(fill(tmp_path, images))


# --- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(LABELS, pa.uint8()),
        pa.array(LABELS).dictionary_encode(),
        pa.array(["0", "1", "0", "1"]),
        pa.array(["maple_tree", "sea", "Maple tree", "sea"]),
        pa.array(["maple_tree", "sea", "maple_tree", "sea"], pa.large_string()),
        pa.array(["maple-tree", "sea", "maple-tree", "sea"]).dictionary_encode(),
    ],
    ids=["uint8", "dictionary", "digits", "names", "large_string", "dictionary of names"],
)
def test_labels_are_numbers_or_names(tmp_path: Path, labels: pa.Array) -> None:
    expected = loaded(fill(tmp_path / "usual"))["train"].fingerprint
    assert loaded(fill(tmp_path / "other", labels=labels))["train"].fingerprint == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (pa.array([0, 1, 0, 2]), "label 2 is outside 0..1"),
        (pa.array([0, 1, 0, -1]), "label -1 is outside 0..1"),
        (pa.array([0, 1, 0, None]), "label None is outside 0..1"),
        (pa.array(["sea", "sea", "sea", "oak_tree"]), "label oak_tree is not a class of Toy"),
        (pa.array(["0", "1", "0", "2"]), "label 2 is not a class of Toy"),
        (pa.array(["sea", None, "sea", "sea"]), "label None is not a class of Toy"),
        (pa.array([0.0, 1.0, 0.0, 1.0]), "column label holds double, expected integers or names of classes"),
        (pa.array([False, True, False, True]), "column label holds bool"),
        (pa.array([[0], [1], [0], [1]]), "column label holds list<"),
    ],
)
def test_other_labels_are_described(tmp_path: Path, labels: pa.Array, message: str) -> None:
    assert message in refused(fill(tmp_path, labels=labels))


def test_numbers_follow_the_names_that_the_file_has_for_them(tmp_path: Path) -> None:
    """ClassLabel: numbers in an order of the file's own are translated; where not all names are ours, none are guessed."""
    expected = loaded(fill(tmp_path / "usual"))["train"].fingerprint
    same: list[tuple[list[str], list[int]]] = [
        (["maple_tree", "sea"], LABELS),
        (["sea", "maple_tree"], [1, 0, 1, 0]),
        (["0", "1"], LABELS),
        (["acer", "sea"], LABELS),  # a spelling of its own
        (["acer", "mare"], LABELS),
    ]
    for number, (names, labels) in enumerate(same):
        splits = loaded(fill(tmp_path / str(number), labels=pa.array(labels), names=names))
        assert splits["train"].fingerprint == expected, names
    message = refused(fill(tmp_path / "moved", names=["sea", "acer"]))
    assert "its class names are not those of Toy, and sea is in another position" in message


def test_a_data_set_that_torchvision_does_not_know_is_parquet_only(tmp_path: Path) -> None:
    layout = replace(NAMED, torchvision="")
    assert refused(tmp_path, layout).startswith(f"Toy not found: {tmp_path}/toy has no train-*.parquet")
    assert loaded(fill(tmp_path), layout)


def test_the_hubs_spelling_of_cifar100_is_read(tmp_path: Path) -> None:
    """The Hub's copy spells crab as cra."""
    layout = replace(CIFAR100.layout, name="toy", size=8, images=None, image_column="img", label_column="label")
    names = [{"crab": "cra"}.get(name, name.replace(" ", "_")) for name in layout.names]
    for split in ("train", "test"):
        write(tmp_path / "toy" / f"{split}-0.parquet", structs(encoded(100, len(split))), pa.array(range(100)), names)
    assert sorted(loaded(tmp_path, layout)["train"].labels) == list(range(100))


# --- the cache --------------------------------------------------------------------------------------------


def test_the_cache_is_of_contents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not of names and times: other contents with the same size and time are converted, the same ones elsewhere are not."""
    first = loaded(fill(tmp_path))["train"].fingerprint
    file = tmp_path / "toy" / "train-00000-of-00001.parquet"
    stat = file.stat()
    (tmp_path / "toy").rename(tmp_path / "moved")
    fill(tmp_path)
    assert loaded(tmp_path)["train"].fingerprint == first
    assert capsys.readouterr().out.count("converting") == 1
    fill(tmp_path, labels=pa.array(LABELS[::-1]))
    assert file.stat().st_size == stat.st_size
    sources._digest.cache_clear()  # as in another process
    assert loaded(tmp_path)["train"].fingerprint != first


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", '{"train_images.npy": "0"}', "", "\xff", '{"a": ["b"]}'])
def test_a_cache_with_damaged_checksums_is_made_again(tmp_path: Path, content: str) -> None:
    before = loaded(fill(tmp_path))["train"].fingerprint
    (checksums,) = (tmp_path / "cache").rglob("checksums.json")
    (array,) = (tmp_path / "cache").rglob("train_labels.npy")
    checksums.write_text(content, encoding="latin1")
    array.write_bytes(array.read_bytes()[:-8] + bytes(8))
    assert loaded(tmp_path)["train"].fingerprint == before
    assert set(json.loads(checksums.read_text())) == {p.name for p in checksums.parent.glob("*.npy")}


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            loaded(tmp_path)
    assert [entry.name for entry in (tmp_path / "cache" / "data").iterdir()] == ["toy.lock"]
    assert loaded(tmp_path)


def test_processes_at_once_convert_once(tmp_path: Path) -> None:
    fill(tmp_path)
    before = sources._save  # slow, so that the others are waiting

    def slow(folder: Path, splits: dict[str, Split]) -> None:
        (tmp_path / f"{os.getpid()}.converted").touch()
        time.sleep(0.5)
        before(folder, splits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_save", slow)
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=loaded, args=(tmp_path,)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.converted"))) == 1
