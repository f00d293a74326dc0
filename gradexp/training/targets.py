"""A teacher's targets, computed once and stored."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.base.files import reserve, write_atomically
from gradexp.data.loader import Batch, Loader, send
from gradexp.terms import Term
from gradexp.terms.targets import Map, Targets

CHUNK = 256  # views computed at a time
CANARY = 8  # views computed again at the start of every run, at each end


class StoredTargets(Targets):
    """A teacher's targets for the (image, view) pairs that a training will show, computed before it starts.

    All methods of a table show the same views of the same images, so their runs share one folder, with one file per quantity,
    and compute only what is missing. Logits are stored in float32, the rest in bfloat16. Values are computed in fixed chunks,
    so that they do not depend on which run computed them or how often it was interrupted.

    target: the output whose input-gradient is stored; None for none. maps: the layer maps that are stored. Anything else is
    computed as `live` does. Raises UserError for a folder with another teacher's values, and RuntimeError for a batch that no
    step shows.
    """

    kind = "stored"  # in records

    def __init__(
        self,
        live: Targets,
        loader: Loader,
        steps: int,
        folder: Path,
        *,
        target: str | None,
        maps: Sequence[Map] = (),
    ) -> None:
        super().__init__(live.teacher, with_gradient=live.with_gradient, layers=live.layers)
        self.loader, self.folder = loader, folder
        self.compute: dict[str, Callable[[Batch], Tensor]] = _quantities(live, target, maps)
        self.keys = loader.visited(steps)
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            first = self._values(0, 1, self.compute)
            self.stored = {
                name: _mapped(folder / name, (len(self.keys), *values.shape[1:]), values.dtype)
                for name, values in first.items()
            }
            self._fill()
        self._check()

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32."""
        return self._read("logits", batch)

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W) bfloat16."""
        name = _name("gradient", target)
        return self._read(name, batch) if name in self.stored else super().input_gradient(batch, target)

    def map(self, batch: Batch, wanted: Map) -> Tensor:
        """(B, h, w) bfloat16."""
        name = _name(*wanted)
        return self._read(name, batch) if name in self.stored else super().map(batch, wanted)

    def _read(self, name: str, batch: Batch) -> Tensor:
        keys = self.loader.key(batch.row, batch.view)  # on the CPU, so that no device is waited for
        slots = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        if not torch.equal(self.keys[slots], keys):
            raise RuntimeError(f"a batch shows views of images for which {self.folder} has no teacher targets")
        return send(self.stored[name][slots], batch.images.device)

    def _values(self, start: int, end: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The quantities `names` of the keys from `start` to `end`, computed by the teacher."""
        keys = self.keys[start:end]
        batch = self.loader.batch(keys // self.loader.views, keys % self.loader.views)
        return {name: self.compute[name](batch).cpu() for name in names}

    def _fill(self) -> None:
        """Computes the chunks that are missing or damaged; each quantity has a `.crc` file with the checksums of its chunks."""
        checksums = {name: self._valid_checksums(name) for name in self.compute}
        absent = [chunk for chunk, sums in enumerate(zip(*checksums.values(), strict=True)) if None in sums]
        if absent:
            print(f"teacher targets: computing {min(len(absent) * CHUNK, len(self.keys))} views once", flush=True)
        for chunk in absent:
            span = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            names = [name for name in checksums if checksums[name][chunk] is None]
            for name, values in self._values(span.start, span.stop, names).items():
                self.stored[name][span] = values
                checksums[name][chunk] = self._checksum(name, chunk)
                write_atomically(self.folder / f"{name}.crc", json.dumps(checksums[name]).encode())

    def _valid_checksums(self, name: str) -> list[int | None]:
        """The checksum of each chunk of a quantity, None for a chunk that is missing or damaged."""
        chunks = -(-len(self.keys) // CHUNK)
        recorded = _read_checksums(self.folder / f"{name}.crc")[:chunks]
        recorded += [None] * (chunks - len(recorded))
        valid = [crc if crc is not None and crc == self._checksum(name, i) else None for i, crc in enumerate(recorded)]
        if valid != recorded:
            print(f"teacher targets: {self.folder / name} is damaged; the damaged part is computed again", flush=True)
        return valid

    def _checksum(self, name: str, chunk: int) -> int:
        values = self.stored[name][chunk * CHUNK : (chunk + 1) * CHUNK]
        return zlib.crc32(values.contiguous().view(torch.uint8).numpy().data)

    def _check(self) -> None:
        """Computes the first and the last few values again and compares. Raises UserError where they differ."""
        for start in {0, max(0, len(self.keys) - CANARY)}:
            for name, values in self._values(start, start + CANARY, self.compute).items():
                distance = (values.float() - self.stored[name][start : start + CANARY].float()).norm()
                if not distance <= 0.05 * values.float().norm():  # not `>`, which NaN would pass
                    wrong = "are not this teacher's, or were computed by other code"
                    raise UserError(f"stored teacher targets in {self.folder} {wrong}; delete that folder")


def live_targets(teacher: nn.Module, terms: Iterable[Term], angle: str | None = None) -> Targets:
    """What these terms read of a teacher, computed for every batch. angle: see `make_targets`."""
    terms = [term for term in terms if term.needs_teacher]
    with_gradient = angle is not None or any(term.gradient_target for term in terms)
    layers = dict.fromkeys(layer for term in terms for layer in term.teacher_layers)
    return Targets(teacher, with_gradient=with_gradient, layers=list(layers))


def make_targets(
    teacher: nn.Module,
    terms: Sequence[Term],
    loader: Loader,
    steps: int,
    *,
    angle: str | None,
    store_gib: float,
    autocast: AbstractContextManager[Any],
    cache: Path,
    origin: Sequence[Any],
) -> Targets:
    """The teacher's targets: stored if all of them can be, fit and will be read 1.5 times or more; else computed per batch.

    angle: an output whose input-gradient is read beside those of the terms. store_gib: the most that stored targets may take.
    origin: identifies the teacher's weights and the precision; each origin has its own folder in `cache`.
    """
    live = live_targets(teacher, terms, angle)
    terms = [term for term in terms if term.needs_teacher]
    gradient_targets = {term.gradient_target for term in terms if term.gradient_target and term.needs_input_gradient}
    gradient_targets |= {angle} if angle else set()
    unstorable = any(term.teacher_layers and not term.teacher_maps for term in terms)  # such as an AttentionJacobian
    if len(gradient_targets) > 1 or "all" in gradient_targets or unstorable:
        return live
    maps = list(dict.fromkeys(layer_map for term in terms for layer_map in term.teacher_maps))
    quantities: dict[str, Any] = {"target": next(iter(gradient_targets), None), "maps": maps}
    views = loader.count * loader.views
    fits = views * bytes_per_view(live, loader, **quantities) <= store_gib * 2**30
    pays = steps * loader.batch_size >= 1.5 * views
    if not (fits and pays):
        return live
    name = hashlib.sha256(json.dumps([*origin, loader.fingerprint, steps]).encode()).hexdigest()[:12]
    with autocast:
        return StoredTargets(live, loader, steps, cache / name, **quantities)


def bytes_per_view(live: Targets, loader: Loader, *, target: str | None, maps: Sequence[Map]) -> int:
    """Bytes that the stored targets of one view take."""
    batch = loader.batch(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    values = [compute(batch) for compute in _quantities(live, target, maps).values()]
    return sum(value.numel() * value.element_size() for value in values)


def _quantities(live: Targets, target: str | None, maps: Sequence[Map]) -> dict[str, Callable[[Batch], Tensor]]:
    """{name of a stored quantity: function that computes it for a batch}."""
    quantities: dict[str, Callable[[Batch], Tensor]] = {"logits": lambda batch: live.logits(batch).float()}
    if target is not None:
        quantities[_name("gradient", target)] = lambda batch: live.input_gradient(batch, target).bfloat16()
    for wanted in maps:
        quantities[_name(*wanted)] = lambda batch, wanted=wanted: live.map(batch, wanted).bfloat16()  # type: ignore[misc]
    return quantities


def _name(*words: str | None) -> str:
    return "-".join(word for word in words if word)


def _read_checksums(file: Path) -> list[int | None]:
    try:
        checksums = json.loads(file.read_text())
        return checksums if isinstance(checksums, list) else []
    except (OSError, ValueError):
        return []


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is backed by the file, which is created where it does not exist."""
    count = math.prod(shape)
    reserve(path, count * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
