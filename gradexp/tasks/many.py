"""Many runs: what is missing, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from gradexp.errors import UserError
from gradexp.runs import Paths, Run, ensure, run_id, say
from gradexp.tasks.compose import Planned, compose_run

# Every run is forked from one server that has already imported what training needs: a process of its own,
# without the ten seconds of imports that a fresh interpreter costs.
PRELOADED = ["gradexp.tasks.train", "gradexp.tasks.compose"]


@dataclass(frozen=True)
class Failure:
    command: str
    log: Path


def missing(planned: Iterable[Planned], paths: Paths) -> list[Planned]:
    """Runs without a record, once each, in order."""
    unique = {run_id(run.config): run for run in planned}
    return [run for run in unique.values() if not paths.record(run.config).exists()]


def upstream_of(runs: Iterable[Planned], paths: Paths) -> list[Planned]:
    """The runs without a record that others stand on, deepest first.

    One with a record but without its weights is done again by its first user, the others wait for it.
    """
    below = [run.upstream for run in runs]
    return missing([found for level in below for found in [*upstream_of(level, paths), *level]], paths)


def run_all(runs: Sequence[Planned], paths: Paths, *, workers: int, extra: Sequence[str] = ()) -> list[Failure]:
    """Does the runs, `workers` at a time, their upstream runs first and once; returns those that failed.

    extra: hardware overrides for every run. The cores are shared out among the workers.
    """
    failures: list[Failure] = []
    for stage in (upstream_of(runs, paths), list(runs)):
        count = min(workers, len(stage)) or 1
        threads = max(1, (os.cpu_count() or 1) // count)
        places = [f"[{i}/{len(stage)}]" for i in range(1, len(stage) + 1)]
        with ThreadPoolExecutor(count) as pool:
            done = pool.map(_run, places, stage, repeat(paths), repeat(threads), repeat(extra))
            failures += [failure for failure in done if failure]
        if failures:
            break
    return failures


def _run(place: str, planned: Planned, paths: Paths, threads: int, extra: Sequence[str]) -> Failure | None:
    log = paths.folder(planned.config) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    begun = time.monotonic()
    process = context.Process(target=_work, args=([*planned.overrides, *extra], threads, log))
    process.start()
    process.join()
    lines = log.read_text().splitlines() if log.exists() else []
    last = lines[-1] if lines else f"it ended with exit code {process.exitcode} and printed nothing"
    print(f"{place} {time.monotonic() - begun:.0f} s  {planned.command}\n    {last}", flush=True)
    return Failure(planned.command, log) if process.exitcode else None


def _work(overrides: Sequence[str], threads: int, log: Path) -> None:
    """What `python run.py OVERRIDES` does, written to a log."""
    import torch

    output = log.open("w", buffering=1)  # stays open: an exit message is written after this function
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(threads)
    try:
        config = compose_run(overrides)
        say(ensure(Run(config, Paths.of(config))))
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
