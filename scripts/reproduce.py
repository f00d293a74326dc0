"""BUDGET=2h make reproduce: the missing runs that fit into this time, most wanted first (conf/budget.yaml).

python scripts/reproduce.py --budget 30m "table 2.1" does those of one table. A run that is not finished in time leaves its
checkpoint, from which it resumes the next time. Estimates are those of make plan, corrected as runs finish.
"""

from __future__ import annotations

import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NotRequired

import filelock
from common import arguments, planner, shared
from joblib import cpu_count
from plan import Estimates
from typing_extensions import TypedDict

from gradexp.base.errors import BUSY, STOPPED, UserError, nearest
from gradexp.base.texts import read_yaml
from gradexp.base.typed import check, strict
from gradexp.engine.command_line import refuse_many_devices
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.launchers import Local, Work, last_line, missing, slots_of
from gradexp.engine.run import ROOT, Run
from gradexp.report import costs, specs
from gradexp.report.specs import Planner

BUDGET = ROOT / "conf" / "budget.yaml"
WARNING = 30.0  # seconds before the end at which runs are asked to write their checkpoints; a fifth of a budget under 150 s
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
RETRY = 10.0  # seconds until a run that another job was doing is looked at again
NEXT = 3  # runs that are named at the end


@strict
class Deciding(TypedDict):
    item: str
    rows: NotRequired[list[str]]
    columns: NotRequired[list[str]]


@strict
class BudgetSpec(TypedDict):
    headline: list[str]
    deciding: list[Deciding]


def seconds_of(text: str) -> float:
    """`1h30m` -> 5400. Raises UserError for another form, and for 0."""
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise UserError(f"BUDGET={text}: expected a time such as 2h, 30m or 1h30m")
    seconds = sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([dhms])", text))
    if not seconds:
        raise UserError(f"BUDGET={text}: it must be more than 0")
    return seconds


def duration(seconds: float) -> str:
    """`1 h 30 min`, `12 min`, `40 s`"""
    if math.isinf(seconds):
        return "an unknown time"
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


# --- the order --------------------------------------------------------------------------------------------


def priorities(scale: str, plan: Planner, only: Sequence[str] = ()) -> dict[Run, tuple[int, ...]]:
    """The runs of the scale's tables and figures, or of those in `only`, each with its priority: the smallest is most wanted.

    A priority is (which seed of its cell, group, place in the group), the groups being those of conf/budget.yaml.
    """
    wanted: BudgetSpec = check(BudgetSpec, read_yaml(BUDGET), "conf/budget.yaml")
    known = specs.every(scale)
    known |= {item: spec for item in only if item not in known and (spec := _own(item)) and scale in spec["seeds"]}
    for item in only:
        if item not in known:
            raise UserError(f"scale={scale} has no {item}{nearest(item, known)}")
    ranked: dict[Run, tuple[int, ...]] = {}
    for number, (item, spec) in enumerate(known.items()):
        if only and item not in only:
            continue
        place = (0, wanted["headline"].index(item)) if item in wanted["headline"] else (2, number)
        for cell in specs.cells(spec, scale):
            decides = any(_covers(entry, item, cell) for entry in wanted["deciding"])
            for position, overrides in enumerate(cell.commands.values()):
                run = plan(overrides)
                rank = (0, 1, number) if decides and position else (position, *place)
                ranked[run] = min(rank, ranked.get(run, rank))
    return ranked


def _own(item: str) -> specs.Spec | None:
    """A table or figure of a package of the user's own; None for another one."""
    kind, _, number = item.partition(" ")
    return specs.load(kind, number) if number in specs.own(kind) else None


def _covers(entry: Deciding, item: str, cell: specs.Cell) -> bool:
    labels = {"rows": cell.row["label"], "columns": cell.column.get("label")}
    return entry["item"] == item and all(label in entry.get(key, [label]) for key, label in labels.items())  # type: ignore[operator]


# --- the runs ---------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """Chooses what is run next, and notes what became of it.

    ranked: runs with their priorities. estimates: of costs. Seconds are of the wall clock, `slots` runs at a time. A run whose
    estimate is more than all `seconds` is never begun.
    """

    ranked: Mapping[Run, tuple[int, ...]]
    estimates: Estimates
    deadline: float  # on time.monotonic, without the time for checkpoints
    slots: int
    seconds: float
    extra: Sequence[str] = ()
    done: list[Run] = field(default_factory=list)
    stopped: list[Run] = field(default_factory=list)
    failed: dict[Run, str] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)  # of times to estimates
    running: dict[Run, tuple[float, float]] = field(default_factory=dict)  # {run: (start, estimate without correction)}
    busy: dict[Run, float] = field(default_factory=dict)  # {run that another job was doing: when that was noticed}
    blocked: bool = False  # whether a run that fits could be done once another job has finished an upstream run of it

    def cost(self, run: Run) -> float:
        """Seconds until a run is finished, its missing upstream runs included."""
        return self.correction * sum(self.alone(each) for each, to_do in costs.needed([run]).items() if to_do)

    def alone(self, run: Run) -> float:
        return float(self.estimates.seconds(run.config, self.slots))

    @property
    def correction(self) -> float:
        """What runs took, divided by their estimates: a median of the last ones, with a 1 for the estimate itself."""
        return statistics.median([1.0, *self.ratios[-9:]]) if self.ratios else 1.0

    def waiting(self) -> list[Run]:
        """The missing runs, most wanted first."""
        left = [run for run in self.ranked if not run.finished and run not in self.failed and run not in self.running]
        return sorted(left, key=lambda run: (self.ranked[run], self.cost(run)))

    def choose(self) -> tuple[Run, Work] | None:
        """The most wanted run that fits into the time that is left, or an upstream run of it; None if nothing does now."""
        self.blocked = False
        for run in self.waiting():
            if time.monotonic() + self.cost(run) > self.deadline:
                continue
            first = self._first(run)
            if first is None:
                continue
            locked = _locked(first)
            if locked or time.monotonic() - self.busy.get(first, -math.inf) < RETRY:
                self.blocked |= first != run or not locked
                continue
            self.running[first] = time.monotonic(), self.alone(first)
            return first, Work((*first.overrides, *self.extra), first.folder / "log.txt", waits=False)
        return None

    def _first(self, run: Run) -> Run | None:
        """The run, or the first of its missing upstream runs; None if one of these failed or is being done here."""
        if run in self.failed or run in self.running or run in self.stopped:
            return None
        for below in missing(run.upstream.values()):
            return self._first(below)
        return run

    def note(self, run: Run, code: int) -> None:
        """After the process of a run has ended."""
        begun, estimate = self.running.pop(run)
        if code == BUSY:  # another job took its lock first
            self.busy[run] = time.monotonic()
            return
        took, line = time.monotonic() - begun, last_line(run.folder / "log.txt", code)
        if run.finished:
            self.done.append(run)
            self.ratios.append(took / max(1.0, estimate))
            self.estimates.learn(run)
        elif time.monotonic() >= self.deadline or code in (STOPPED, -signal.SIGTERM):
            self.stopped.append(run)
        else:
            self.failed[run] = line
        print(f"[{len(self.done)} done] {duration(took)}, estimate {duration(estimate)}  {run.command}\n    {line}", flush=True)

    def summary(self) -> list[str]:
        """What was done and what comes next."""
        counts = [f"{len(self.done)} runs done", f"{len(self.stopped)} stopped at the end", f"{len(self.failed)} failed"]
        lines = [f"{', '.join(counts)}; {len(self.waiting())} wanted runs are missing"]
        for run in self.stopped:
            kept = run.checkpoint.exists() or run.pieces.exists()
            lines.append(f"  {'resumes' if kept else 'begins again'} next time: {run.command}")
        lines += [f"  failed: {run.command}\n    {line} (log: {run.folder / 'log.txt'})" for run, line in self.failed.items()]
        following = [run for run in self.waiting() if run not in self.stopped][:NEXT]
        lines += [f"  next: {run.command}   (about {duration(self.cost(run))})" for run in following]
        if long := [run for run in self.waiting() if self.cost(run) > self.seconds]:
            cheapest = min(long, key=self.cost)
            how_many = "nothing fits into the budget" if long == self.waiting() else f"longer than the budget: {len(long)}"
            lines.append(
                f"  {how_many}, never begun in it; the cheapest run takes about {duration(self.cost(cheapest))}, "
                f"start it by its command: {cheapest.command}"
            )
        return lines


def _locked(run: Run) -> bool:
    """Whether another process, such as that of another job, is doing the run."""
    path = run.paths.outputs / "locks" / f"{run.id}.lock"
    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def spend(
    seconds: float, ranked: Mapping[Run, tuple[int, ...]], estimates: Estimates, *, workers: int, extra: Sequence[str] = ()
) -> Budget:
    """Does the runs that fit into `seconds`, and leaves to other jobs what they do; prints what it did and what comes next."""
    warning, slots = min(WARNING, seconds / 5), slots_of(workers)
    end = time.monotonic() + seconds
    budget = Budget(ranked, estimates, end - warning, slots, seconds - warning, extra)
    try:
        while True:
            for run, code in Local().each(budget.choose, slots, deadline=end, warning=warning):
                budget.note(run, code)
            if not budget.blocked or time.monotonic() + RETRY > budget.deadline:
                break
            time.sleep(RETRY)  # what is left stands on runs of other jobs
    finally:
        print(f"budget of {duration(seconds)}:", "\n".join(budget.summary()), flush=True)
    return budget


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("items", nargs="*", help="tables and figures, such as 'table 2.1'; all if none is named")
    parser.add_argument("--budget", required=True, help="such as 2h, 30m or 1h30m")
    parser.add_argument("--workers", type=int, default=min(2, cpu_count()))
    parser.add_argument("--launcher", default="local")
    given = parser.parse_args()
    begun = time.monotonic()
    with exit_on_errors():
        if given.launcher != "local":
            raise UserError(
                f"BUDGET with LAUNCHER={given.launcher}: start this command in the jobs of an array (docs/cluster.md)"
            )
        try:
            seconds, config = seconds_of(given.budget), shared(given.scale, given.set)
            if given.workers > 1:
                refuse_many_devices(config)
            items = [part for item in given.items for part in parts(item)]
            ranked = priorities(given.scale, planner(given.set), items)
        except UserError as error:  # `make` must not render after it, as it does if a run failed
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        estimates = Estimates(config, ranked)
        left = max(1.0, seconds - (time.monotonic() - begun))
        budget = spend(left, ranked, estimates, workers=given.workers, extra=given.set)
        sys.exit(1 if budget.failed else 0)


def parts(item: str) -> list[str]:
    """`figure 3.2` -> `figure 3.2a`, ... Raises UserError for what is neither a table nor a figure."""
    kind, _, number = item.partition(" ")
    if kind not in specs.KINDS:
        raise UserError(f"{item}: expected 'table 2.1' or 'figure 3.2'")
    return [f"{kind} {part}" for part in specs.parts(kind, number)]


if __name__ == "__main__":
    main()
