"""Where images come from: parquet in Hub layout, torchvision's files, or torchvision's download.

Whatever the source, a data set becomes the same four uint8/int64 arrays, sorted by a hash of each image's
pixels: subsets and fingerprints do not depend on the order in which a source stores its rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gradexp.base.errors import UserError
from gradexp.base.files import draft_of, remove_drafts, sha256
from gradexp.data import parquet, subsets
from gradexp.data.parquet import Layout

SPLITS, PARTS = ("train", "test"), ("images", "labels")
CHECKSUMS, PACK = "checksums.json", "pack.json"  # beside the arrays of a cached data set


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8, labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name, values, dtype, ndim in (("images", self.images, np.uint8, 4), ("labels", self.labels, np.int64, 1)):
            if values.dtype != dtype or values.ndim != ndim:
                what = f"{values.dtype} {values.shape}"
                raise UserError(f"{name} of a data set are {what}, expected images (N, C, H, W) uint8 and labels (N,) int64")

    def only(self, classes: Sequence[int]) -> Split:
        """The images of these classes, numbered anew from 0 in the order of `classes`."""
        rows, labels = subsets.only(self.labels, classes)
        return Split(self.images[rows], labels)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Where in `images` those of these indices are."""
        return indices

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


@dataclass(frozen=True)
class PackedSplit(Split):
    """Some images of a training set, as scripts/pack_data.py leaves them, that stand for all of it.

    images: only those that were packed. labels (N,), fingerprint and colours are of the complete split, as they were noted
    in `pack` when it was at hand, so that subsets, normalisation and records are those of the complete data set.
    """

    pack: dict[str, Any]

    def only(self, classes: Sequence[int]) -> Split:
        raise UserError("data.only_classes is not for packed data; use the complete data set")

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Where in `images` those of these indices are. Raises UserError for one that was not packed."""
        packed = np.asarray(self.pack["rows"])
        rows = np.minimum(np.searchsorted(packed, indices), len(packed) - 1)
        if not np.array_equal(packed[rows], indices):
            raise UserError(
                f"the packed data holds {len(packed)} of {len(self.labels)} training images ({self.pack['subset']}), this run "
                f"needs others; take such a subset, or the complete data set, or pack again with scripts/pack_data.py"
            )
        return rows

    @property
    def fingerprint(self) -> str:
        return str(self.pack["fingerprint"])

    @property
    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self.pack["colours"]
        return np.asarray(mean), np.asarray(std)


def load(layout: Layout, root: Path, cache: Path) -> dict[str, Split]:
    """Both splits of a data set as read-only memory maps; converts on first use.

    Raises UserError when no source holds it, or when the files are damaged.
    """
    (cache / "data").mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / "data" / f"{layout.name}.lock"):  # of the download too
        source, files, read = _find(layout, root)
        contents = [[file.name, _digest(file, *_stamp(file))] for file in files]
        folder = cache / "data" / f"{layout.name}-{_key([source, repr(layout), contents])}"
        if (splits := _opened(folder, _stamps(folder))) is None:
            print(f"{layout.title}: converting from {source} (once)", flush=True)
            _save(folder, read())
            splits = _opened(folder, _stamps(folder))
    assert splits is not None
    return splits


# --- the three sources ------------------------------------------------------------------------------------

Reader = Callable[[], dict[str, Split]]


def _find(layout: Layout, root: Path) -> tuple[str, list[Path], Reader]:
    """(name of the source, its files, what reads them)."""
    folder = root / layout.name
    parts = {split: parquet.parts(folder, split) for split in SPLITS}
    if any(parts.values()):
        return "parquet", _different(folder, parts), partial(_from_parquet, layout, parts)
    if not layout.torchvision:
        raise UserError(f"{layout.title} not found: {folder} has no train-*.parquet and test-*.parquet; put them there")
    reasons = []
    for get in (_torchvision, _download):
        try:
            rows = get(layout, root)
            return "torchvision", _torchvision_files(layout, root), partial(_from_torchvision, layout, rows)
        except Exception as error:  # torchvision raises RuntimeError, OSError, URLError, pickle errors, ...
            reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise UserError(
        f"{layout.title} not found. Tried:\n"
        f"  1. parquet: {folder}/train-*.parquet and test-*.parquet (none there)\n"
        f"  2. torchvision's files in {root} ({reasons[0]})\n"
        f"  3. torchvision's download into {root} ({reasons[1]})\n"
        f"Put one of them there, or name the folder that has it: GRADEXP_DATA=FOLDER or paths.data=FOLDER; "
        f"see docs/data.md."
    )


def _different(folder: Path, parts: dict[str, list[Path]]) -> list[Path]:
    """The files of both splits. Raises UserError where a split has none, or where two files are the same."""
    files = [file for split in SPLITS for file in parts[split]]
    absent = [split for split in SPLITS if not parts[split]]
    if absent:
        names = ", ".join(file.name for file in files)
        what = f"{folder} holds no {absent[0]}-*.parquet, only {names}"
        raise UserError(f"{what}; fetch it, or delete them to use another source")
    digests: dict[str, Path] = {}
    for file in files:
        same = digests.setdefault(_digest(file, *_stamp(file)), file)
        if same != file:
            raise UserError(f"{folder}: {same.name} and {file.name} are the same file; delete one and fetch what is missing")
    return files


def _from_parquet(layout: Layout, parts: dict[str, list[Path]]) -> dict[str, Split]:
    splits = {split: _sorted(*parquet.read(layout, parts[split])) for split in SPLITS}
    if (pack := parquet.read_pack(parts["train"])) is not None:
        splits["train"] = _unpacked(parts["train"][0], splits["train"], pack)
    return _checked(layout, splits)


def _unpacked(file: Path, split: Split, pack: dict[str, Any]) -> PackedSplit:
    """Raises UserError where the images are not those that were packed."""
    try:
        labels = np.asarray(pack["labels"], dtype=np.int64)
        intact = pack["packed"] == split.fingerprint and np.array_equal(labels[pack["rows"]], split.labels)
    except (KeyError, IndexError, TypeError, ValueError):
        intact = False
    if not intact:
        raise UserError(f"{file} was changed after it was packed; pack it again with scripts/pack_data.py")
    return PackedSplit(split.images, labels, pack)


Rows = tuple[np.ndarray, np.ndarray]


def _torchvision(layout: Layout, root: Path, download: bool = False) -> dict[str, Rows]:
    import torchvision.datasets

    splits = {}
    for split in SPLITS:
        dataset = getattr(torchvision.datasets, layout.torchvision)(str(root), train=split == "train", download=download)
        pixels = np.asarray(dataset.data)
        pixels = pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
        splits[split] = pixels, np.asarray(dataset.targets, dtype=np.int64)
    return splits


def _from_torchvision(layout: Layout, rows: dict[str, Rows]) -> dict[str, Split]:
    return _checked(layout, {split: _sorted(*rows[split]) for split in SPLITS})


def _download(layout: Layout, root: Path) -> dict[str, Rows]:
    """Downloads beside the data root's folders and moves the files there when all of them can be read."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist")
    with tempfile.TemporaryDirectory(prefix=f".{layout.name}.", dir=root) as draft:
        splits = _torchvision(layout, Path(draft), download=True)
        for file in _torchvision_files(layout, Path(draft)):
            target = root / file.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    return splits


def _torchvision_files(layout: Layout, root: Path) -> list[Path]:
    import torchvision.datasets

    folder = root / getattr(getattr(torchvision.datasets, layout.torchvision), "base_folder", layout.torchvision)
    return sorted(file for file in folder.rglob("*") if file.is_file())


# --- the converted arrays ---------------------------------------------------------------------------------


def _checked(layout: Layout, splits: dict[str, Split]) -> dict[str, Split]:
    """Raises UserError where a class has no image, or where there are not as many images as the data set has."""
    for number, (name, split) in enumerate(splits.items()):
        empty = sorted(set(range(layout.classes)) - set(split.labels.tolist()))
        if empty:
            raise UserError(f"{layout.title}, {name}: no image of class {empty[0]}; fetch the data set again")
        if layout.images and len(split.labels) != layout.images[number]:
            counts = f"{len(split.labels)} images instead of {layout.images[number]}"
            raise UserError(f"{layout.title}, {name}: {counts}; fetch the data set again")
    return splits


def _sorted(images: np.ndarray, labels: np.ndarray) -> Split:
    keys = [(hashlib.sha1(image.tobytes()).digest(), label) for image, label in zip(images, labels, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return Split(np.ascontiguousarray(images[order], dtype=np.uint8), labels[order])


def _save(folder: Path, splits: dict[str, Split]) -> None:
    remove_drafts(folder)
    draft = draft_of(folder)
    draft.mkdir()
    try:
        for name, split in splits.items():
            np.save(draft / f"{name}_images.npy", split.images)
            np.save(draft / f"{name}_labels.npy", split.labels)
        if isinstance(split := splits["train"], PackedSplit):
            (draft / PACK).write_text(json.dumps(split.pack))
        checksums = {file.name: sha256(file) for file in sorted(draft.iterdir())}
        (draft / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@lru_cache(maxsize=8)
def _opened(folder: Path, stamps: str) -> dict[str, Split] | None:
    """The splits in a folder; None where they are not there or damaged.

    A process verifies and describes them once: a run's check, the run itself and its upstream runs share the memory maps.
    stamps: of the folder's files, so that changed files are read anew.
    """
    if not _intact(folder):
        return None
    splits = {split: Split(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r") for part in PARTS)) for split in SPLITS}
    if (folder / PACK).exists():
        pack = json.loads((folder / PACK).read_text())
        splits["train"] = PackedSplit(splits["train"].images, splits["train"].labels, pack)
    return splits


def _intact(folder: Path) -> bool:
    try:
        checksums = dict(json.loads((folder / CHECKSUMS).read_text()))
        complete = {f"{split}_{part}.npy" for split in SPLITS for part in PARTS} <= checksums.keys()
        return complete and all(sha256(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, TypeError):
        return False


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    """SHA-256 of the contents, computed once per process for each size and time of change, which `_stamp` gives."""
    return sha256(file)


def _stamp(file: Path) -> tuple[int, int]:
    """(bytes, time of the last change)."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _stamps(folder: Path) -> str:
    return json.dumps([[file.name, *_stamp(file)] for file in sorted(folder.glob("*"))])


def _key(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
