"""Long work other than training, done in pieces: a killed run resumes after its last piece."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradexp.base.files import intact, write_sealed
from gradexp.engine import clocks
from gradexp.engine.clocks import Progress
from gradexp.engine.hardware import Hardware
from gradexp.engine.origin import git_state
from gradexp.engine.run import Run

Item = TypeVar("Item")
Piece = TypeVar("Piece")  # tensors on the CPU, numbers, and containers of these


class Pieces:
    """Finished pieces, which are stored in `run.pieces` until the run has its record.

    Random numbers of a piece must depend on its number only, so that a resumed run gives the same numbers as an undisturbed
    one. Damaged pieces, those of other runs, and those made from other files of upstream runs, are made again.

    used: SHA-256 of the files of upstream runs, by name.
    """

    def __init__(self, run: Run, hardware: Hardware, used: Mapping[str, str]) -> None:
        self.run, self.title = run, f"{run.name} {run.id}"
        self.folder = run.pieces / hashlib.sha256(json.dumps(dict(used), sort_keys=True).encode()).hexdigest()[:12]
        facts = hardware.facts(mixed=False)
        self.origin = {"git": git_state(), "device": facts["device"], "precision": facts["precision"], "upstream": dict(used)}
        self.earlier = dict.fromkeys(clocks.CLOCKS, 0.0)
        self.attempts: list[dict[str, Any]] = []  # earlier ones whose origin was another

    def facts(self) -> dict[str, Any]:
        """The fields of a record about pieces of earlier attempts: their seconds and their origins."""
        return {"earlier_seconds": self.earlier, **({"attempts": self.attempts} if self.attempts else {})}

    def each(self, name: str, items: Iterable[Item], make: Callable[[int, Item], Piece], *, count: int) -> list[Piece]:
        """make(number, item) for each of the `count` items; stored results of earlier attempts are loaded instead."""
        files = [self.folder / f"{name}_{number}.pt" for number in range(count)]
        stored = [self._load(file, f"{name} {number}") for number, file in enumerate(files)]
        progress = Progress(f"{self.title}: {name}", count, "pieces", done=sum(content is not None for content in stored))
        pieces = []
        for number, (file, item) in enumerate(zip(files, items, strict=True)):
            if (content := stored[number]) is not None:
                pieces.append(self._count(content))
                continue
            begun = clocks.read()
            piece = make(number, item)
            archive = io.BytesIO()
            facts = {"run": self.run.id, "name": f"{name} {number}", "seconds": clocks.since(begun), "origin": self.origin}
            torch.save({"piece": piece, **facts}, archive)
            write_sealed(file, archive.getvalue())
            pieces.append(piece)
            progress.update(number + 1 + sum(content is not None for content in stored[number + 1 :]))
        return pieces

    def _load(self, file: Path, name: str) -> dict[str, Any] | None:
        """A stored piece with its facts; None where it does not exist, is damaged, or is another piece or another run's."""
        if not intact(file):
            return None
        try:
            content: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
            own = (content["run"], content["name"]) == (self.run.id, name)
        except Exception:  # torch raises whatever its readers of archives do
            own = False
        if not own:
            print(f"{self.title}: {file} is damaged or of another run, so it is made again", flush=True)
        return content if own else None

    def _count(self, content: dict[str, Any]) -> Any:
        """A stored piece, whose seconds and origin are added to those of earlier attempts."""
        for clock in clocks.CLOCKS:
            self.earlier[clock] += content["seconds"][clock]
        if content["origin"] not in (self.origin, *self.attempts):
            self.attempts.append(content["origin"])
        return content["piece"]
