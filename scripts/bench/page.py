"""The whole benchmark: a page and its numbers in results/bench for each machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import loops, networks, photographs, runs, saliency, steps
from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.base.texts import read_json
from gradexp.engine.hardware import native_bf16
from gradexp.engine.origin import git_state, versions

ROWS: dict[str, type[Any]] = {  # of each part of the page
    "steps": steps.Row,
    "networks": networks.Row,
    "loops": loops.Row,
    "maps": saliency.Row,
    "photographs": photographs.Row,
    "runs": runs.Row,
}
SAME = ("batch", "versions")  # what the parts of one machine's page have in common


def run(results: Path, *, quick: bool, parts: Collection[str] = ROWS) -> str:
    """Measures, writes bench/MACHINE.md and MACHINE.json (not for `quick`), and returns the Markdown.

    parts: those to measure; the others stay as they are in MACHINE.json, which must be of the same versions.
    """
    hardware = steps.make_hardware("32")
    has_bf16 = native_bf16(hardware.kind)
    precisions = ["32", "bf16"] if has_bf16 else ["32"]
    if quick:
        precisions = precisions[-1:]  # what a run takes here: `trainer.precision=auto`
        parts = ("steps", "maps", "photographs")
    machine = {**hardware.facts(), "precision": precisions, "batch": steps.BATCH, "versions": versions()}
    name = re.sub("[^a-z0-9.]+", "-", f"{machine['device']} {machine['threads']} threads".lower())
    numbers, page = (results / "bench" / f"{name}.{suffix}" for suffix in ("json", "md"))
    kept = {} if set(parts) == set(ROWS) or quick else _kept(numbers, machine)
    measures: dict[str, Callable[[], list[Any]]] = {
        "steps": lambda: _steps(precisions, quick=quick),
        "networks": lambda: networks.rows(rounds=3),
        "loops": lambda: [loops.measure(n, steps.make_hardware(precisions[-1]), steps=30, rounds=5) for n in (1, 10)],
        "maps": lambda: saliency.rows(hardware, quick=quick),
        "photographs": lambda: [photographs.measure(hardware, images=64 if quick else 512, rounds=1 if quick else 5)],
        "runs": lambda: [runs.measure(passes=600, rounds=3)],
    }
    measured = {part: {**git_state(), "rows": measures[part]()} for part in measures if part in parts}
    found = {part: (kept | measured)[part] for part in measures if part in kept | measured}
    text = markdown(machine, found, has_bf16)
    if not quick:
        plain = {part: {**one, "rows": [asdict(row) for row in one["rows"]]} for part, one in found.items()}
        write_atomically(numbers, (json.dumps({"machine": machine, **plain}, indent=2) + "\n").encode())
        write_atomically(page, text.encode())
    return text


def _steps(precisions: list[str], *, quick: bool) -> list[steps.Row]:
    how: dict[str, Any] = {"rounds": 7, "memory": not quick, "budget": 25 if quick else math.inf}
    models = ["vgg4"] if quick else list(steps.MODELS)
    ways = [(model, steps.make_hardware(precision)) for model in models for precision in precisions]
    return [row for model, hardware in ways for row in steps.measure(model, hardware, steps.KINDS, **how)]


def _kept(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The parts that are there."""
    if not path.exists():
        raise UserError(f"{path} is not there; measure everything first: make bench")
    found = read_json(path, "measure everything again: make bench")
    if differing := [name for name in SAME if found["machine"].get(name) != machine[name]]:
        raise UserError(f"{path} was measured with another {', '.join(differing)}; measure everything again: make bench")
    there = {part: found[part] for part in ROWS if part in found}
    try:
        return {part: {**one, "rows": [ROWS[part](**row) for row in one["rows"]]} for part, one in there.items()}
    except TypeError:  # rows without a field, or with another
        raise UserError(f"{path} was measured by older code; measure everything again: make bench") from None


def markdown(machine: dict[str, Any], found: dict[str, Any], has_bf16: bool) -> str:
    """The parts that were measured, each with the commit at which it was."""
    write: dict[str, Callable[[Any], str]] = {
        "steps": lambda rows: steps.markdown(rows, machine, has_bf16),
        "networks": networks.markdown,
        "loops": loops.markdown,
        "maps": saliency.markdown,
        "photographs": lambda rows: photographs.markdown(rows[0]),
        "runs": lambda rows: runs.markdown(rows[0]),
    }
    return "\n".join(
        f"{write[part](one['rows'])}\nMeasured at commit {str(one['commit'])[:7]}{', with changes' if one['dirty'] else ''}.\n"
        for part, one in found.items()
    )
