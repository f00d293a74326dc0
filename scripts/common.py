"""What the scripts share: arguments, runs that are missing, messages."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from joblib import cpu_count

from gradexp.base.errors import MissingError, UserError
from gradexp.engine.command_line import refuse_many_devices
from gradexp.engine.compose import compose_ahead, compose_run, plan
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.launchers import Failure, generations, make_launcher, missing, run_all
from gradexp.engine.run import ROOT, Config, Paths, part_of
from gradexp.report import specs
from gradexp.report.specs import Planner

SETTABLE = ("trainer", "logger", "gradients", "paths")  # the parts of a config that may be set for all runs
CLAIMS = ROOT / "conf" / "claims.yaml"

Make = Callable[[Any, "Job"], None]  # of a TableSpec or a FigureSpec


@dataclass(frozen=True)
class Job:
    """How tables or figures are made. trains: whether missing runs are done. extra: overrides of hardware and paths."""

    scale: str
    paths: Paths
    trains: bool
    workers: int
    extra: Sequence[str]
    launcher: Any

    @property
    def plan(self) -> Planner:
        return planner(self.extra)

    def fill(self, title: str, wanted: Iterable[Sequence[str]]) -> list[Failure]:
        """Does the missing ones of the runs with these overrides; returns those that failed."""
        runs = [self.plan(overrides) for overrides in dict.fromkeys(map(tuple, wanted))]
        absent = missing(runs) if self.trains else []
        if not absent:
            return []
        below = sum(map(len, generations(absent))) - len(absent)
        upstream = f", and {below} upstream" if below else ""
        print(f"{title}, scale={self.scale}: {len(absent)} of {len(runs)} runs are missing{upstream}", flush=True)
        return run_all(absent, workers=self.workers, extra=self.extra, launcher=self.launcher)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of all scripts."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--scale", default="cpu")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help=f"for all runs: {', '.join(SETTABLE)}"
    )
    return parser


def planner(extra: Sequence[str]) -> Planner:
    """A function from overrides to a run, on the hardware and paths of `extra`."""
    return partial(plan, extra=tuple(extra))


def shared(scale: str, words: Sequence[str]) -> Config:
    """A config with the hardware and paths of all runs. Raises UserError for an override that decides numbers."""
    for word in words:
        key = part_of(word)
        if key == "launcher":
            raise UserError(f"{word}: only tables and figures take it: LAUNCHER=slurm SET='launcher.KEY=VALUE'")
        if key not in SETTABLE:
            raise UserError(
                f"{word}: only {', '.join(SETTABLE)} can be set here, because conf/ names the runs of tables and figures; "
                f"for a run of your own type python run.py experiment=... {word}"
            )
    return compose_run(["experiment=teacher", f"scale={scale}", *words])


def make_all(kind: str, make: Make, about: str | None) -> None:
    """Makes the tables or figures that the command line names; without names, all that can be made."""
    parser = arguments(about)
    parser.add_argument("numbers", nargs="*", help=f"{kind}s to make, such as 2.1; all if none is named")
    parser.add_argument("--workers", type=int, default=min(2, cpu_count()))
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--launcher", default="local", help="a file of conf/launcher: local or slurm; --set takes its keys")
    given = parser.parse_args()
    with exit_on_errors():
        launcher_words = [word for word in given.set if word.startswith("launcher.")]
        extra = [word for word in given.set if word not in launcher_words]
        config = shared(given.scale, extra)
        if given.workers < 1:
            raise UserError(f"WORKERS={given.workers}: it must be 1 or more; --render-only does no runs")
        if given.workers > 1:
            refuse_many_devices(config)
        launcher = make_launcher(given.launcher, launcher_words)
        job = Job(given.scale, Paths.of(config), not given.render_only, given.workers, extra, launcher)
        for part in [part for number in given.numbers for part in specs.parts(kind, number)]:
            make(specs.load(kind, part), job)
        if not given.numbers and not make_every(kind, make, job):
            sys.exit(1)


def make_every(kind: str, make: Make, job: Job) -> bool:
    """Makes all tables or figures of the scale; prints the errors. Returns whether there was none.

    Where nothing is trained, a figure whose runs are missing is no error.
    """
    succeeded, every = True, specs.at_scale(kind, job.scale).values()
    cells = [(spec, cell, seed) for spec in every for cell in specs.cells(spec, job.scale) for seed in cell.commands]
    wanted = [cell.commands[seed] for _, cell, seed in cells]
    wanted += [specs.command(spec, cell.row, cell.column, "paper", 0) for spec, cell, _ in cells]  # with which captions compare
    compose_ahead(wanted, job.extra)
    for spec in every:
        try:
            make(spec, job)
        except UserError as error:
            print(error)
            succeeded = succeeded and isinstance(error, MissingError) and not job.trains
    return succeeded


def report(files: Iterable[Path], failures: Sequence[Failure]) -> None:
    """Prints which files were written. Raises UserError with the runs that failed."""
    if written := [shown(file) for file in files]:
        print("written:", *written)
    if failures:
        failed = "\n".join(f"  {failure.command}   (log: {shown(failure.log)})" for failure in failures)
        raise UserError(f"{len(failures)} run{'s' * (len(failures) > 1)} failed; fix and retry:\n{failed}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
