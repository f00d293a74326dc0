"""scripts/pack_data.py: runs on a packed subset see what they see on the complete data set."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gradexp.base.errors import UserError
from gradexp.data.cifar100 import CIFAR100
from gradexp.data.dataset import ImageData
from gradexp.data.digits import Digits
from gradexp.data.parquet import Layout
from gradexp.engine.run import ROOT

OPTIONS: dict[str, Any] = {"flip": False, "crop": 0, "normalise": "standard", "validation": None, "seed": 0, "per_class": None}


class ParquetDigits(ImageData):
    layout = Layout("digits", "Digits", 10, 1, 16, image_column="image", label_column="label", torchvision="MNIST")


def digits(root: Path, **changes: Any) -> ParquetDigits:
    options = {**OPTIONS, "name": "digits", "classes": 10, "channels": 1, "size": 16, "root": root, "cache": root / "cache"}
    return ParquetDigits(**{**options, **changes})


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("pack_data", ROOT / "scripts" / "pack_data.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, script: Any) -> tuple[Path, Path]:
    """All digits as parquet, and five of each for seeds 0 and 1."""
    whole, packed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("packed")
    options = {**OPTIONS, "name": "digits", "classes": 10, "channels": 1, "size": 16, "root": whole, "cache": whole}
    for name, split in Digits(**options).splits().items():
        script.write(whole / "digits" / f"{name}-00000-of-00001.parquet", ParquetDigits.layout, split, {})
    script.pack(ParquetDigits.layout, digits(whole).splits(), packed, 5, [0, 1])
    return whole, packed


def same(whole: ImageData, packed: ImageData) -> None:
    """Records, statistics and batches of a training and of the test set."""
    assert packed.fingerprint() == whole.fingerprint()
    for first, second in zip(packed.statistics, whole.statistics, strict=True):
        assert torch.equal(first, second)
    options: dict[str, Any] = {"batch_size": 64, "device": "cpu"}
    assert packed.train_loader(**options).fingerprint == whole.train_loader(**options).fingerprint
    assert packed.test_loader(**options).fingerprint == whole.test_loader(**options).fingerprint
    for one, other in zip(packed.train_loader(**options), whole.train_loader(**options), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("per_class", [5, 2])
@pytest.mark.parametrize("choice", [{"seed": 0}, {"seed": 1}, {"seed": 7, "subset_seed": 1}])
def test_a_packed_subset_is_that_of_the_complete_data(roots: tuple[Path, Path], per_class: int, choice: dict[str, int]) -> None:
    same(*(digits(root, per_class=per_class, **choice) for root in roots))


@pytest.mark.parametrize("choice", [{"per_class": None}, {"per_class": 6}, {"seed": 2}, {"validation": 0.1}])
def test_a_run_that_needs_other_images_is_refused(roots: tuple[Path, Path], choice: dict[str, Any]) -> None:
    data = digits(roots[1], **{"per_class": 5, **choice})
    with pytest.raises(UserError, match=r"holds \d+ of 1438 training images \(5 per class, seeds 0, 1\)"):
        data.fingerprint()
    with pytest.raises(UserError, match="this run needs others"):
        data.train_loader(batch_size=8, device="cpu")
        data.test_loader(batch_size=8, device="cpu")


@pytest.mark.parametrize("name", ["mit_scenes", "imagenet", "digits"])
def test_data_that_is_not_read_from_parquet_is_refused(
    name: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pack_data.py", name, "--per-class", "1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"only cifar10, cifar100 and mnist are read from parquet.*copy their folder"):
        script.main()


def test_classes_are_not_left_out_of_packed_data(roots: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="only_classes is not for packed data"):
        digits(roots[1], per_class=5, classes=2, only_classes=[3, 4]).fingerprint()


def test_a_pack_is_packed_again(roots: tuple[Path, Path], script: Any, tmp_path: Path) -> None:
    script.pack(ParquetDigits.layout, digits(roots[1]).splits(), tmp_path, 3, [1])
    same(*(digits(root, per_class=3, seed=1) for root in (roots[0], tmp_path)))
    with pytest.raises(UserError, match="holds parquet files"):
        script.pack(ParquetDigits.layout, digits(roots[0]).splits(), tmp_path, 3, [1])


@pytest.mark.parametrize("change", ["rows lost", "labels", "note"])
def test_a_pack_that_was_changed_is_refused(roots: tuple[Path, Path], tmp_path: Path, change: str) -> None:
    (tmp_path / "digits").mkdir()
    for file in (roots[1] / "digits").iterdir():
        table = pq.read_table(file)
        if "train" in file.name:
            if change == "rows lost":
                table = table.slice(1)
            elif change == "labels":
                table = table.set_column(1, "label", [np.roll(table["label"], 1)])
            else:
                table = table.replace_schema_metadata({**table.schema.metadata, b"gradexp": b'{"rows": [0]}'})
        pq.write_table(table, tmp_path / "digits" / file.name)
    with pytest.raises(UserError, match="was changed after it was packed"):
        digits(tmp_path, per_class=5).fingerprint()


ROOT_OF_DATA = Path(os.environ.get("GRADEXP_DATA") or "nowhere")


class Half(CIFAR100):
    layout = replace(CIFAR100.layout, images=(5000, 5000))


@pytest.mark.skipif(not (ROOT_OF_DATA / "cifar100").is_dir(), reason="GRADEXP_DATA has no cifar100")
def test_cifar100_is_packed(tmp_path: Path, script: Any) -> None:
    """Halves of its test images stand for both splits: all of it takes a minute to convert."""
    options = {**OPTIONS, "name": "cifar100", "classes": 100, "channels": 3, "size": 32, "per_class": 2, "seed": 3}
    (file,) = (ROOT_OF_DATA / "cifar100").rglob("test-*.parquet")
    rows = pq.read_table(file)
    (tmp_path / "whole" / "cifar100").mkdir(parents=True)
    for split, start in (("train", 0), ("test", 5000)):
        pq.write_table(rows.slice(start, 5000), tmp_path / "whole" / "cifar100" / f"{split}-00000-of-00001.parquet")
    whole = Half(**options, root=tmp_path / "whole", cache=tmp_path / "whole")
    folder = script.pack(Half.layout, whole.splits(), tmp_path, 2, [3])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 30 * 2**20
    same(whole, Half(**options, root=tmp_path, cache=tmp_path))
