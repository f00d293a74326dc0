"""Many runs: those that are missing, each in its own process, upstream runs first."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.launchers import Local, Slurm, Work
from gradexp.engine.run import Run


@dataclass(frozen=True)
class Failure:
    command: str
    log: Path


def missing(runs: Iterable[Run]) -> list[Run]:
    """Runs without a record, once each, in order."""
    return [run for run in dict.fromkeys(runs) if not run.finished]


def generations(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs and all missing ones below them, once each: every run in a later generation than its upstream runs.

    One with a record but without its weights is done again by its first user, the others wait for it.
    """
    depth: dict[str, tuple[int, Run]] = {}

    def visit(run: Run) -> int:
        if run.id not in depth:
            below = missing(run.upstream.values())
            depth[run.id] = (1 + max(map(visit, below), default=-1), run)
        return depth[run.id][0]

    for run in missing(runs):
        visit(run)
    last = max((level for level, _ in depth.values()), default=-1)
    return [[run for level, run in depth.values() if level == wanted] for wanted in range(last + 1)]


def make_launcher(name: str, words: Sequence[str] = ()) -> Any:
    """The launcher of conf/launcher/NAME.yaml. words: `launcher.KEY=VALUE`. Raises UserError for a name or key there is not."""
    config = compose_run(["experiment=teacher", f"+launcher={name}", *words])
    return build(config["launcher"], where="launcher")


def run_all(
    runs: Sequence[Run], *, workers: int, extra: Sequence[str] = (), launcher: Local | Slurm | None = None
) -> list[Failure]:
    """Does the runs, their upstream runs first and once; returns those that failed and those that wait for them.

    extra: hardware overrides for every run. The cores are shared out among the workers.
    """
    launcher, stages = launcher or Local(), generations(runs)
    tell = _Progress(sum(map(len, stages)))
    failed: dict[str, Failure] = {}
    for stage in stages:
        ready = []
        for run in stage:
            cause = next((failed[below.id] for below in run.upstream.values() if below.id in failed), None)
            if cause:
                failed[run.id] = Failure(run.command, cause.log)
            else:
                ready.append(run)
        failed |= _do_stage(ready, workers, extra, launcher, tell)
    return list(failed.values())


def _do_stage(
    runs: Sequence[Run], workers: int, extra: Sequence[str], launcher: Local | Slurm, tell: _Progress
) -> dict[str, Failure]:
    """Does runs that do not wait for each other, and says how each ended; {id: failure} of those that failed."""
    works = [Work((*run.overrides, *extra), run.folder / "log.txt") for run in runs]
    failed: dict[str, Failure] = {}

    def ended(number: int, code: int) -> None:
        run, log = runs[number], works[number].log
        tell(run.command, _last_line(log, code))
        if code:
            failed[run.id] = Failure(run.command, log)

    if works:
        launcher.do(works, workers, ended)
    return failed


class _Progress:
    """Says, of all runs that a command does, how many have ended, and after how long; several threads may speak."""

    def __init__(self, total: int) -> None:
        self.total, self.ended, self.begun, self.lock = total, 0, time.monotonic(), threading.Lock()

    def __call__(self, command: str, result: str) -> None:
        with self.lock:
            self.ended += 1
            print(f"[{self.ended}/{self.total}] {time.monotonic() - self.begun:.0f} s  {command}\n    {result}", flush=True)


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text().splitlines() if log.exists() else []
    if code < 0:  # its last line is about its progress
        return f"killed by signal {-code}; it last said: {lines[-1] if lines else 'nothing'}"
    return lines[-1] if lines else f"it ended with exit code {code} and printed nothing"
