"""Many runs: those without a record, each in its own process, upstream runs first."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from joblib import cpu_count

from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.launchers import Local, Slurm, Work, visible_gpus
from gradexp.engine.run import Run


@dataclass(frozen=True)
class Failure:
    command: str
    log: Path


def missing(runs: Iterable[Run]) -> list[Run]:
    """Runs without a record, once each, in order."""
    return [run for run in dict.fromkeys(runs) if not run.finished]


def generations(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs and their missing upstream runs, once each, every run in a later generation than its upstream runs.

    An upstream run with a record but without its weights is done again by the first run that needs it; others wait for it.
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
    """The launcher of conf/launcher/NAME.yaml. words: `launcher.KEY=VALUE`. Raises UserError for an unknown name or key."""
    config = compose_run(["experiment=teacher", f"+launcher={name}", *words])
    return build(config["launcher"], where="launcher")


def run_all(
    runs: Sequence[Run], *, workers: int, extra: Sequence[str] = (), launcher: Local | Slurm | None = None
) -> list[Failure]:
    """Does the runs, their upstream runs first and once. Returns those that failed, and those whose upstream run failed.

    extra: hardware overrides for every run. The cores are shared out among the workers.
    """
    launcher, stages, begun = launcher or Local(), generations(runs), time.monotonic()
    total, count, failed = sum(map(len, stages)), 0, dict[str, Failure]()
    for stage in stages:
        ready = []
        for run in stage:
            cause = next((failed[below.id] for below in run.upstream.values() if below.id in failed), None)
            if cause:
                failed[run.id] = Failure(run.command, cause.log)
            else:
                ready.append(run)
        works = [Work((*run.overrides, *extra), run.folder / "log.txt") for run in ready]
        for index, code in launcher.do(works, workers) if works else ():
            run, log = ready[index], works[index].log
            count += 1
            seconds = time.monotonic() - begun
            print(f"[{count}/{total}] {seconds:.0f} s  {run.command}\n    {last_line(log, code)}", flush=True)
            if code:
                failed[run.id] = Failure(run.command, log)
    return list(failed.values())


class UntilDeadline(Local):
    """Local processes, each given the work that is chosen when it is free, until a deadline.

    At `warning` seconds before the deadline the running processes get SIGTERM, so that they write their checkpoints; a process
    that still runs at the deadline is killed. Times are those of time.monotonic.
    """

    def __init__(self, deadline: float, warning: float) -> None:
        super().__init__()
        self.deadline, self.warning = deadline, warning
        self._late = False  # whether it was this object that stopped the processes

    def each(self, choose: Callable[[], tuple[Any, Work] | None], slots: int) -> Iterator[tuple[Any, int]]:
        """Yields (key, exit code) when the work of a key ends. choose: (key, work) or None, asked again after each end.

        Raises Stopped after SIGTERM or SIGINT to this process, once the running ones have ended.
        """
        gpus = visible_gpus()
        free: list[str | None] = [*gpus[:slots]] or [None] * slots
        threads = max(1, cpu_count() // slots)
        with self._forwarding_signals():
            while True:
                while free and not self._stopped and (chosen := choose()):
                    self._start(*chosen, threads, free.pop())
                if not self._running:
                    break
                for sentinel in self._wait():
                    key, process, gpu = self._running.pop(sentinel)
                    process.join()
                    free.append(gpu)
                    yield key, process.exitcode
        if not self._late:
            self._raise_if_stopped()

    def _wait(self) -> list[Any]:
        """The processes that have ended; none at the warning and at the deadline, when signals are sent."""
        end = self.deadline if self._stopped else self.deadline - self.warning
        ended = connection.wait(list(self._running), timeout=max(0.0, end - time.monotonic()))
        if not ended:
            for _key, process, _gpu in self._running.values():
                (process.kill if self._stopped else process.terminate)()
            self._late = self._late or not self._stopped
            self._stopped = signal.SIGTERM
        return ended


def slots_of(workers: int) -> int:
    """How many runs are done at a time: one on each GPU, where there are any."""
    return min(workers, len(visible_gpus()) or workers)


def last_line(log: Path, code: int) -> str:
    lines = log.read_text().splitlines() if log.exists() else []
    if code < 0:  # its last line is about its progress
        return f"killed by signal {-code}; its last output: {lines[-1] if lines else 'none'}"
    return lines[-1] if lines else f"it ended with exit code {code} and printed nothing"
