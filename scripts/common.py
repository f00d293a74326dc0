"""What make_table.py and make_figure.py share: arguments, running what is missing, errors without a traceback."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradexp.errors import UserError
from gradexp.report import specs
from gradexp.runs import ROOT, Paths
from gradexp.tasks.compose import compose_run, plan
from gradexp.tasks.many import Failure, missing, run_all

Make = Callable[[dict[str, Any], "Job"], None]


@dataclass(frozen=True)
class Job:
    """At which scale, with how many workers (0: render only), where, and with which hardware overrides."""

    scale: str
    workers: int
    paths: Paths
    extra: Sequence[str]

    def fill(self, title: str, wanted: Iterable[Sequence[str]]) -> list[Failure]:
        """Runs what is missing of the runs that these overrides stand for; returns those that failed."""
        runs = [plan(overrides) for overrides in wanted]
        absent = missing(runs, self.paths) if self.workers else []
        if not absent:
            return []
        print(f"{title}, scale={self.scale}: {len(absent)} of {len(runs)} runs are missing", flush=True)
        return run_all(absent, self.paths, workers=self.workers, extra=self.extra)


def make_all(kind: str, make: Make, about: str | None) -> None:
    """Makes the tables or figures that the command line names; all of them when it names none, as far as they can be made."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("numbers", nargs="*", help=f"{kind}s to make, such as 2.1; all of them when none is named")
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of trainer, logger or paths, for every run")
    given = parser.parse_args()
    try:
        paths = Paths.of(compose_run(["experiment=teacher", *given.set]))
        job = Job(given.scale, 0 if given.render_only else given.workers, paths, given.set)
        for part in [part for number in given.numbers for part in specs.parts(kind, number)]:
            make(specs.load(kind, part), job)
        for number in [] if given.numbers else specs.numbers(kind):
            try:
                make(specs.load(kind, number), job)
            except UserError as error:
                print(error)
    except UserError as error:
        sys.exit(f"error: {error}")


def report(files: Iterable[Path], failures: Sequence[Failure]) -> None:
    """Says what was written. Raises UserError naming the runs that failed."""
    print("written:", *(shown(file) for file in files))
    if failures:
        failed = "\n".join(f"  {failure.command}   (log: {shown(failure.log)})" for failure in failures)
        raise UserError(f"{len(failures)} runs failed; mend and retry:\n{failed}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
