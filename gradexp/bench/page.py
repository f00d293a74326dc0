"""The whole benchmark: results/bench.md and bench.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradexp.bench import loops, photographs, runs, saliency, steps
from gradexp.runs import git_state, versions, write_atomically
from gradexp.tasks.hardware import native_bf16


def run(results: Path, *, quick: bool) -> str:
    """Measures, writes bench.md and bench.json (not for `quick`), and returns the Markdown."""
    hardware = steps.make_hardware("32")
    has_bf16 = native_bf16(hardware.kind)
    precisions = ["32", "bf16"] if has_bf16 else ["32"]
    if quick:
        precisions = precisions[-1:]  # what a run takes here: `trainer.precision=auto`
    facts = {**hardware.facts(), "precision": precisions, "batch": steps.BATCH, "versions": versions(), **git_state()}
    rows: list[steps.Row] = []
    how: dict[str, Any] = {"rounds": 7, "memory": not quick, "budget": 25 if quick else math.inf}
    for model in ["vgg4"] if quick else steps.MODELS:
        for precision in precisions:
            rows += steps.measure(model, steps.make_hardware(precision), steps.KINDS, **how)
    trainer = (
        [] if quick else [loops.measure(count, steps.make_hardware(precisions[-1]), steps=30, rounds=5) for count in (1, 10)]
    )
    maps = saliency.rows(hardware, quick=quick)
    files = photographs.measure(hardware, images=64 if quick else 512, rounds=1 if quick else 5)
    if quick:
        return "\n".join([steps.markdown(rows, facts, has_bf16), saliency.markdown(maps), photographs.markdown(files)])
    whole = runs.measure(passes=600, rounds=3)
    measured: dict[str, Sequence[Any]] = {
        "rows": rows,
        "loops": trainer,
        "maps": maps,
        "photographs": [files],
        "runs": [whole],
    }
    found = {name: [asdict(row) for row in part] for name, part in measured.items()}
    pages = [steps.markdown(rows, facts, has_bf16), loops.markdown(trainer), saliency.markdown(maps)]
    text = "\n".join([*pages, photographs.markdown(files), runs.markdown(whole)])
    write_atomically(results / "bench.json", (json.dumps({"machine": facts, **found}, indent=2) + "\n").encode())
    write_atomically(results / "bench.md", text.encode())
    return text
