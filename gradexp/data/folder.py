"""Data sets of image files, decoded in threads while the model trains."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from joblib import cpu_count
from PIL import Image
from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.base.files import intact, write_sealed
from gradexp.data import pictures, subsets
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch, Loader, send

THREADS = max(2, cpu_count())  # Pillow decodes and resizes outside the interpreter lock
AHEAD = 64  # images decoded before they are asked for


@dataclass(frozen=True)
class Files:
    """Image files under `root`, ordered by a hash of their names so that the first are of all classes.

    labels (N,) int64; digests (N,) of the files' bytes.
    """

    root: Path
    names: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    corrupt: int = 0

    def only(self, classes: Sequence[int]) -> Files:
        """The files of these classes, numbered anew from 0 in the order of `classes`."""
        rows, labels = subsets.only(self.labels, classes)
        return replace(self, names=self.names[rows], labels=labels, digests=self.digests[rows])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of contents and labels, shortened to 16 digits."""
        digest = hashlib.sha256("".join(self.digests.tolist()).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]


class FolderData(ImageData, ABC):
    """Images of any size in files. The short side is resized to size + 2 crop, then a window of `size` pixels is cut:
    anywhere in training, in the middle at test time.

    mean, std: of pixels in [0, 1], for `normalise: standard`. skip_corrupt: leave out files that can't be decoded
    instead of stopping. A split is opened when it is first asked for, so one that is never used need not be there.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], skip_corrupt: bool, **options: Any) -> None:
        super().__init__(**options)
        if self.channels != 3:
            raise UserError(f"data.channels={self.channels}: files of pictures are read as RGB; take data.channels=3")
        if self.removal is not None:
            raise UserError("data.removal is not for data sets of image files; set it to null")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.channels:
                raise UserError(f"data.{name} has {len(values)} numbers; the images have {self.channels} channels")
        self.mean, self.std, self.skip_corrupt = mean, std, skip_corrupt
        self._opened = Opened(self._open)

    @abstractmethod
    def files(self, split: str) -> tuple[Path, list[str], list[int]]:
        """(folder, names below it, labels) of `train` or `test`. Raises UserError where they are not as they should be."""

    def complete(self, classes: int) -> bool:
        """Whether a split of so many classes is the whole one; where some are left out, those that are kept decide."""
        return classes == self.classes or self.only_classes is not None

    def splits(self) -> Mapping[str, Files]:
        return self._opened

    def _open(self, split: str) -> Files:
        folder, names, labels = self.files(split)
        order = np.argsort([hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in names])
        files = Files(folder, np.asarray(names)[order], np.asarray(labels, dtype=np.int64)[order], np.empty(0))
        return checked(files, f"{self.name}-{split}", self.cache, skip=self.skip_corrupt)

    @property
    def colours(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and standard deviation, as configured; (C,) each."""
        return torch.tensor(self.mean), torch.tensor(self.std)

    def fingerprint(self) -> dict[str, Any]:
        """Contents and counts, for the record of a run, of the splits that were opened (of the test split where none was)."""
        facts: dict[str, Any] = {"name": self.name}
        if "train" in self._opened:
            train, chosen = self._training
            facts |= {"train": train.fingerprint, "subset": subsets.fingerprint(chosen), "train_images": len(chosen)}
        test, evaluated = self._testing
        facts |= {"test": test.fingerprint, "test_images": len(evaluated)}
        corrupt = sum(files.corrupt for files in self._opened.values())
        return facts | ({"corrupt_images": corrupt} if corrupt else {})

    def _loader(self, split: Any, indices: np.ndarray, batch_size: int, device: Any, **options: Any) -> Loader:
        mean, std = self.statistics
        common = {"batch_size": batch_size, "mean": mean, "std": std, "device": device, "seed": self.seed}
        return FileLoader(split, indices, size=self.size, resize=self.size + 2 * self.crop, **common, **options)


class Opened(dict[str, Files]):
    """The splits, each opened when it is first read."""

    def __init__(self, open: Callable[[str], Files]) -> None:
        super().__init__()
        self.open = open

    def __missing__(self, split: str) -> Files:
        return self.setdefault(split, self.open(split))


# --- batches ----------------------------------------------------------------------------------------------


class FileLoader(Loader):
    """Batches of the files at `indices`: decoded in threads ahead of time, normalised on the device.

    size: of the windows. resize: the short side before a window is cut. A view is a window and whether it is mirrored;
    along the longer side the windows are as many, further apart. options: as for Loader.
    """

    def __init__(self, files: Files, indices: Any, *, size: int, resize: int, **options: Any) -> None:
        super().__init__(files.labels[indices], **options)
        self.root, self.names, self.digests = files.root, files.names[indices], files.digests[indices]
        self.size, self.resize = size, resize

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256("".join(self.digests.tolist()).encode())
        for values in (self.labels, self.scale, self.shift):
            digest.update(values.cpu().numpy().tobytes())
        digest.update(repr((self.batch_size, self.flip, self.crop, self.seed, self.size, self.resize)).encode())
        return digest.hexdigest()[:16]

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, len(self.scale), self.size, self.size, device=self.labels.device)

    def batch(self, rows: Tensor, view: Tensor) -> Batch:
        return next(self._made([(rows, view)]))

    def _made(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """The batches of these rows and views, in order; about AHEAD images are decoded before they are asked for."""
        waiting, decoding = deque(wanted), deque[list[Future[np.ndarray]]]()
        with ThreadPoolExecutor(THREADS) as pool:
            try:
                for rows, view in wanted:
                    while waiting and len(decoding) <= 1 + AHEAD // self.batch_size:
                        next_rows, next_view = waiting.popleft()
                        pairs = zip(next_rows.tolist(), next_view.tolist(), strict=True)
                        decoding.append([pool.submit(self._read, *pair) for pair in pairs])
                    yield self._batch(np.stack([image.result() for image in decoding.popleft()]), rows, view)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, pixels: np.ndarray, rows: Tensor, view: Tensor) -> Batch:
        """pixels (B, H, W, C) uint8: channels-last in memory already.

        On a CPU NumPy normalises them, in this thread: torch's threads would fight for the cores with those that decode.
        """
        device = self.labels.device
        if device.type == "cpu":
            values = np.multiply(pixels, self.scale.ravel().numpy(), dtype=np.float32)
            values -= self.shift.ravel().numpy()
            images = torch.from_numpy(values).permute(0, 3, 1, 2)
        else:
            images = send(torch.from_numpy(pixels), device).permute(0, 3, 1, 2) * self.scale - self.shift
        return Batch(images, self.labels[send(rows, device)], rows, view)

    def _read(self, row: int, view: int) -> np.ndarray:
        side = 2 * self.crop + 1
        place = (view // side % side / (side - 1), view % side / (side - 1)) if self.crop else (0.5, 0.5)
        file = self.root / self.names[row]
        try:
            return window(file, size=self.size, resize=self.resize, place=place, mirrored=view >= side**2)
        except pictures.UnreadableError as error:
            raise UserError(f"{file} can't be read any more ({error}); put it back and run again") from None


def window(file: Path, *, size: int, resize: int, place: tuple[float, float], mirrored: bool) -> np.ndarray:
    """A window of an image whose short side was resized; (size, size, 3) uint8.

    place: (row, column) of the window, as fractions of what there is to choose from. What lies outside the window is not
    resized, and a large JPEG is decoded at a half, a quarter or an eighth of its size where that is enough.
    """
    image = pictures.decode(file, short=resize)
    short = min(image.size)
    box: list[list[float]] = []
    for length, part in zip(image.size, place[::-1], strict=True):
        whole = int(resize * length / short)  # this side after resizing, as torchvision has it
        start = round(part * (whole - size))
        box.append([edge * length / whole for edge in (start, start + size)])
    (left, right), (top, bottom) = box
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))
    return pixels[:, ::-1] if mirrored else pixels


# --- checking ---------------------------------------------------------------------------------------------


def checked(files: Files, name: str, cache: Path, *, skip: bool) -> Files:
    """The files that can be decoded, with digests of their bytes. Every file is read once; the results are cached.

    A file is examined again when its size or a time of its last change (of the contents, of the entry) is another.
    Raises UserError naming those that can't be decoded, unless they are to be skipped.
    """
    stats = [(files.root / file).stat() for file in files.names]
    stamps = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
    key = hashlib.sha256(json.dumps([str(files.root), files.names.tolist(), stamps]).encode()).hexdigest()[:12]
    kept = cache / "data" / f"{name}-{key}-checked.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{kept}.lock"):
        if not intact(kept):
            print(f"{name}: checking {len(files.names)} images (once)", flush=True)
            with ThreadPool(THREADS) as pool:
                examined = pool.map(_examine, [files.root / file for file in files.names])
            write_sealed(kept, json.dumps(examined).encode())
        results = json.loads(kept.read_bytes())
    good = np.array([bool(digest) for digest, _ in results])
    if not good.all() and not skip:
        bad = [f"  {files.root / file} ({why})" for file, (digest, why) in zip(files.names, results, strict=True) if not digest]
        raise UserError(
            f"{name}: {len(bad)} of {len(results)} images can't be decoded:\n"
            + "\n".join(bad[:10] + [f"  and {len(bad) - 10} more"] * (len(bad) > 10))
            + "\nFetch them again, or leave them out: data.skip_corrupt=true (in an upstream run, "
            + "+upstream.NAME.data.skip_corrupt=true, with its name there)"
        )
    digests = np.array([digest for digest, _ in results])[good]
    return Files(files.root, files.names[good], files.labels[good], digests, corrupt=int((~good).sum()))


def _examine(file: Path) -> tuple[str, str]:
    """(digest of the bytes, "") of an image that can be decoded, ("", why) of another."""
    try:
        content = file.read_bytes()
        pictures.decode(io.BytesIO(content), short=1)  # an eighth of the size shows as well whether the stream is complete
    except (OSError, pictures.UnreadableError) as error:
        return "", str(error)
    return hashlib.sha1(content).hexdigest()[:16], ""
