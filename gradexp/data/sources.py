"""Where images come from: parquet in Hub layout, torchvision's files, or torchvision's download.

Whatever the source, a data set becomes the same four uint8/int64 arrays, sorted by a hash of each image's
pixels: subsets and fingerprints do not depend on the order in which a source stores its rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gradexp.base.errors import UserError
from gradexp.base.files import draft_of, sha256
from gradexp.data import subsets

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Layout:
    """What is needed to read and check one data set."""

    name: str
    title: str
    classes: int
    channels: int
    size: int
    image_column: str
    label_column: str
    torchvision: str


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8, labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def only(self, classes: Sequence[int]) -> Split:
        """The images of these classes, numbered anew from 0 in the order of `classes`."""
        rows, labels = subsets.only(self.labels, classes)
        return Split(self.images[rows], labels)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, shortened to 16 digits."""
        digest = hashlib.sha256(self.images.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the pixels in [0, 1] of each channel; (C,) each."""
        values = np.arange(256) / 255
        channels = range(self.images.shape[1])
        counts = np.stack([np.bincount(self.images[:, channel].reshape(-1), minlength=256) for channel in channels])
        weights = counts / counts.sum(1, keepdims=True)
        mean = weights @ values
        return mean, np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))


def load(layout: Layout, root: Path, cache: Path) -> dict[str, Split]:
    """Both splits of a data set as read-only memory maps; converts on first use.

    Raises UserError when no source holds it, or when the files are damaged.
    """
    (cache / "data").mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / "data" / f"{layout.name}.lock"):  # of the download too
        source, files, read = _find(layout, root)
        key = hashlib.sha256(json.dumps([source, _stamps(files)]).encode()).hexdigest()[:12]
        folder = cache / "data" / f"{layout.name}-{key}"
        if (splits := _opened(folder, json.dumps(_stamps(sorted(folder.glob("*")))))) is None:
            print(f"{layout.title}: converting from {source} (once)", flush=True)
            _save(folder, {split: _sorted(_checked(layout, *read(split), split)) for split in SPLITS})
            splits = _opened(folder, json.dumps(_stamps(sorted(folder.glob("*")))))
    assert splits is not None
    return splits


# --- the three sources ------------------------------------------------------------------------------------

Rows = tuple[np.ndarray, np.ndarray]
Reader = Callable[[str], Rows]


def _find(layout: Layout, root: Path) -> tuple[str, list[Path], Reader]:
    parquet = {split: sorted((root / layout.name).glob(f"{split}-*.parquet")) for split in SPLITS}
    if all(parquet.values()):
        files = [file for split in SPLITS for file in parquet[split]]
        return "parquet", files, lambda split: _read_parquet(layout, parquet[split])
    partial = [file for split in SPLITS for file in parquet[split]]
    trouble = f"only {', '.join(file.name for file in partial)} there" if partial else "none there"
    for download in (False, True):
        if download and not root.is_dir():
            reason = f"{root} does not exist"
            break
        try:
            splits = {split: _torchvision(layout, root, split, download) for split in SPLITS}
            files = sorted(file for file in _torchvision_folder(layout, root).rglob("*") if file.is_file())
            return "torchvision", files, splits.__getitem__
        except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, pickle errors, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(
        f"{layout.title} not found. Tried:\n"
        f"  1. parquet: {root / layout.name}/train-*.parquet and test-*.parquet ({trouble})\n"
        f"  2. torchvision's files in {root}\n"
        f"  3. torchvision's download into {root} ({reason})\n"
        f"Put one of them there, or name the folder that has it: GRADEXP_DATA=FOLDER or paths.data=FOLDER; "
        f"see README, Data sets."
    )


def _read_parquet(layout: Layout, files: Iterable[Path]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        try:
            columns = {layout.image_column, layout.label_column}
            missing = columns - set(pyarrow.parquet.read_schema(file).names)
            if missing:
                raise _damaged(file, f"it has no column {', '.join(sorted(missing))}")
            table = pyarrow.parquet.read_table(file, columns=sorted(columns))
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(file, str(error).splitlines()[0]) from None
        for row, value in enumerate(table[layout.image_column].to_pylist()):
            images.append(_decode(layout, file, row, value))
        labels += table[layout.label_column].to_pylist()
        wrong = [label for label in labels if not isinstance(label, int) or not 0 <= label < layout.classes]
        if wrong:
            raise _damaged(file, f"label {wrong[0]} is outside 0..{layout.classes - 1}")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def _decode(layout: Layout, file: Path, row: int, value: dict[str, bytes] | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO((value or {})["bytes"])) as picture:
            pixels = np.asarray(picture.convert("RGB" if layout.channels == 3 else "L"))
    except Exception as error:
        raise _damaged(file, f"row {row} holds no readable image ({error})") from None
    pixels = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    if pixels.shape != (layout.channels, layout.size, layout.size):
        raise _damaged(file, f"row {row} is {pixels.shape[2]}x{pixels.shape[1]} pixels, not {layout.size}x{layout.size}")
    return pixels


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} can't be used: {why.rstrip('.')}. Fetch the file again, or delete it to use another source.")


def _torchvision(layout: Layout, root: Path, split: str, download: bool) -> Rows:
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, layout.torchvision)(str(root), train=split == "train", download=download)
    pixels = np.asarray(dataset.data)
    pixels = pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    return pixels, np.asarray(dataset.targets, dtype=np.int64)


def _torchvision_folder(layout: Layout, root: Path) -> Path:
    import torchvision.datasets

    return root / getattr(getattr(torchvision.datasets, layout.torchvision), "base_folder", layout.torchvision)


# --- the converted arrays ---------------------------------------------------------------------------------


def _checked(layout: Layout, images: np.ndarray, labels: np.ndarray, split: str) -> Split:
    empty = sorted(set(range(layout.classes)) - set(labels.tolist()))
    if empty:
        raise UserError(f"{layout.title}, {split}: no image of class {empty[0]}; fetch the data set again")
    return Split(np.ascontiguousarray(images, dtype=np.uint8), labels)


def _sorted(split: Split) -> Split:
    keys = [(hashlib.sha1(image.tobytes()).digest(), label) for image, label in zip(split.images, split.labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Split(split.images[order], split.labels[order])


def _save(folder: Path, splits: dict[str, Split]) -> None:
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left)  # of a process that died; this one holds the lock
    draft = draft_of(folder)
    draft.mkdir()
    for name, split in splits.items():
        np.save(draft / f"{name}_images.npy", split.images)
        np.save(draft / f"{name}_labels.npy", split.labels)
    checksums = {file.name: sha256(file) for file in sorted(draft.glob("*.npy"))}
    (draft / "checksums.json").write_text(json.dumps(checksums, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


@lru_cache(maxsize=8)
def _opened(folder: Path, stamps: str) -> dict[str, Split] | None:
    """The splits in a folder; None where they are not there or damaged.

    A process verifies and describes them once: a run's check, the run itself and its upstream runs share the memory maps.
    stamps: of the folder's files, so that changed files are read anew.
    """
    if not _intact(folder):
        return None
    return {
        split: Split(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in ("images", "labels")))
        for split in SPLITS
    }


def _stamps(files: Iterable[Path]) -> list[list[Any]]:
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _intact(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / "checksums.json").read_text())
        return all(sha256(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError):
        return False
