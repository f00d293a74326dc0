"""A teacher's targets, computed once."""

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
from gradexp.data.loader import Batch, Loader
from gradexp.terms import Term
from gradexp.terms.targets import Map, Targets

CHUNK = 256  # views computed at a time
CANARY = 8  # views computed again at the start of every run


class StoredTargets(Targets):
    """A teacher's targets for exactly the (image, view) pairs that a training will show, computed once.

    Every method of a table shows the same views of the same images, so all of them, and every repeat of a run,
    share one folder with a file for each quantity, and compute only what is not there yet. Logits are kept in float32,
    the rest in bfloat16. They are computed in fixed chunks before training starts: what a run reads does not depend
    on who computed it, or on how often it was interrupted.

    target: whose input-gradient is kept, None for none. maps: of which layers. Anything else is computed as in `live`.
    Raises UserError when stored values are not the teacher's.
    """

    kind = "stored"

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
            self.kept = {
                name: _mapped(folder / name, (len(self.keys), *one.shape[1:]), one.dtype) for name, one in first.items()
            }
            self._fill()
        self._check()

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32."""
        return self._read("logits", batch)

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W) bfloat16."""
        name = _name("gradient", target)
        return self._read(name, batch) if name in self.kept else super().input_gradient(batch, target)

    def map(self, batch: Batch, wanted: Map) -> Tensor:
        """(B, h, w) bfloat16."""
        name = _name(*wanted)
        return self._read(name, batch) if name in self.kept else super().map(batch, wanted)

    def _read(self, name: str, batch: Batch) -> Tensor:
        keys = self.loader.key(batch.row.cpu(), batch.view.cpu())  # a trainer moves whole batches to its device
        slots = torch.searchsorted(self.keys, keys)
        return self.kept[name][slots].to(batch.images.device)

    def _values(self, start: int, end: int, names: Iterable[str]) -> dict[str, Tensor]:
        keys = self.keys[start:end]
        batch = self.loader.batch(keys // self.loader.views, keys % self.loader.views)
        return {name: self.compute[name](batch).cpu() for name in names}

    def _fill(self) -> None:
        """Computes the chunks that are not there, or are not what was computed: a `.crc` file holds their checksums."""
        chunks = -(-len(self.keys) // CHUNK)
        files = {name: self.folder / f"{name}.crc" for name in self.compute}
        sums = {name: _read_sums(file)[:chunks] for name, file in files.items()}
        for name, known in sums.items():
            right = [i < len(known) and known[i] == self._sum(name, i) for i in range(chunks)]
            sums[name] = [known[i] if right[i] else None for i in range(chunks)]
            if any(known[i] is not None and not right[i] for i in range(len(known))):
                print(f"teacher targets: {self.folder / name} is damaged; what is wrong is computed again", flush=True)
        absent = [chunk for chunk in range(chunks) if any(known[chunk] is None for known in sums.values())]
        if absent:
            print(f"teacher targets: computing {min(len(absent) * CHUNK, len(self.keys))} views once", flush=True)
        for chunk in absent:
            span = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            for name, values in self._values(span.start, span.stop, [n for n in sums if sums[n][chunk] is None]).items():
                self.kept[name][span] = values
                sums[name][chunk] = self._sum(name, chunk)
                write_atomically(files[name], json.dumps(sums[name]).encode())

    def _sum(self, name: str, chunk: int) -> int:
        values = self.kept[name][chunk * CHUNK : (chunk + 1) * CHUNK]
        return zlib.crc32(values.contiguous().view(torch.uint8).numpy().data)

    def _check(self) -> None:
        """A canary: the first chunk's head and the last one's are computed again."""
        for start in {0, max(0, len(self.keys) - CANARY)}:
            for name, values in self._values(start, start + CANARY, self.compute).items():
                distance = (values.float() - self.kept[name][start : start + CANARY].float()).norm()
                if not distance <= 0.05 * values.float().norm():  # NaN is no teacher's either
                    raise UserError(f"stored teacher targets in {self.folder} are not this teacher's; delete that folder")


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
    """The teacher's targets: computed once for all views where that pays, otherwise for every batch.

    angle: whose input-gradient is asked for beside those of the terms. store_gib: the most that stored targets may take.
    origin: names the teacher's weights and the precision; `cache` has a folder for each.
    """
    helped = [term for term in terms if term.needs_teacher]
    wanted = {term.gradient_target for term in helped if term.gradient_target and term.needs_input_gradient}
    wanted |= {angle} if angle else set()
    layers = list(dict.fromkeys(layer for term in helped for layer in term.teacher_layers))
    with_gradient = bool(wanted) or any(term.gradient_target for term in helped)
    live = Targets(teacher, with_gradient=with_gradient, layers=layers)
    if len(wanted) > 1 or "all" in wanted or any(term.teacher_layers and not term.teacher_maps for term in helped):
        return live
    maps = list(dict.fromkeys(one for term in helped for one in term.teacher_maps))
    what: dict[str, Any] = {"target": next(iter(wanted), None), "maps": maps}
    views = loader.count * loader.views
    fits = views * bytes_each(live, loader, **what) <= store_gib * 2**30
    pays = steps * loader.batch_size >= 1.5 * views
    if not (fits and pays):
        return live
    name = hashlib.sha256(json.dumps([*origin, loader.fingerprint, steps]).encode()).hexdigest()[:12]
    with autocast:
        return StoredTargets(live, loader, steps, cache / name, **what)


def bytes_each(live: Targets, loader: Loader, *, target: str | None, maps: Sequence[Map]) -> int:
    """What storing one view's targets takes."""
    batch = loader.batch(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    values = [compute(batch) for compute in _quantities(live, target, maps).values()]
    return sum(value.numel() * value.element_size() for value in values)


def _quantities(live: Targets, target: str | None, maps: Sequence[Map]) -> dict[str, Callable[[Batch], Tensor]]:
    """{name: how to compute it}."""
    found: dict[str, Callable[[Batch], Tensor]] = {"logits": lambda batch: live.logits(batch).float()}
    if target is not None:
        found[_name("gradient", target)] = lambda batch: live.input_gradient(batch, target).bfloat16()
    for wanted in maps:
        found[_name(*wanted)] = lambda batch, wanted=wanted: live.map(batch, wanted).bfloat16()  # type: ignore[misc]
    return found


def _name(*words: str | None) -> str:
    return "-".join(word for word in words if word)


def _read_sums(file: Path) -> list[int | None]:
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, list) else []
    except (OSError, ValueError):
        return []


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    reserve(path, count * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
