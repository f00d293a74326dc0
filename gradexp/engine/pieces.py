"""Long work that is no training, done piece by piece: a killed run goes on after its last one."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from gradexp.base.files import intact, write_sealed
from gradexp.engine import clocks
from gradexp.engine.hardware import Hardware
from gradexp.engine.origin import git_state
from gradexp.engine.progress import Progress
from gradexp.engine.run import Run

Item = TypeVar("Item")
Piece = TypeVar("Piece")  # tensors on the CPU, numbers, and containers of these


class Pieces:
    """Each is kept in `run.pieces` from when it is done until the run has its record.

    What is drawn at random for a piece must depend on its number alone, so that the numbers of a resumed run are those of
    an undisturbed one. Pieces that stand on other files of upstream runs are not taken, nor damaged ones.

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
        """What a record says of pieces that earlier attempts made: their seconds, and where they come from."""
        return {"earlier_seconds": self.earlier, **({"attempts": self.attempts} if self.attempts else {})}

    def each(self, name: str, items: Iterable[Item], make: Callable[[int, Item], Piece], *, count: int) -> list[Piece]:
        """make(number, item) of all `count` items; of those that are kept, what an earlier attempt made."""
        files = [self.folder / f"{name}_{number}.pt" for number in range(count)]
        kept = [intact(file) for file in files]
        progress = Progress(f"{self.title}: {name}", count, "pieces", done=sum(kept))
        pieces = []
        for number, (file, item) in enumerate(zip(files, items, strict=True)):
            if kept[number]:
                pieces.append(self._kept(file))
                continue
            pieces.append(self._made(file, partial(make, number, item)))
            progress.say(number + 1 + sum(kept[number + 1 :]))
        return pieces

    def _kept(self, file: Path) -> Any:
        content = torch.load(file, weights_only=True, map_location="cpu")
        for clock in clocks.CLOCKS:
            self.earlier[clock] += content["seconds"][clock]
        if content["origin"] not in (self.origin, *self.attempts):
            self.attempts.append(content["origin"])
        return content["piece"]

    def _made(self, file: Path, make: Callable[[], Piece]) -> Piece:
        begun, content = clocks.read(), io.BytesIO()
        piece = make()
        torch.save({"piece": piece, "seconds": clocks.since(begun), "origin": self.origin}, content)
        write_sealed(file, lambda draft: draft.write_bytes(content.getvalue()))
        return piece
