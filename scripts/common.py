"""What the scripts share: arguments, running what is missing, errors without a traceback."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from joblib import cpu_count

from gradexp.base.errors import UserError
from gradexp.engine.compose import compose_run, plan, refuse_many_devices
from gradexp.engine.exits import honest
from gradexp.engine.many import Failure, generations, make_launcher, missing, run_all
from gradexp.engine.run import ROOT, Config, Paths
from gradexp.report import specs
from gradexp.report.specs import Planner

ON_WHAT = ("trainer", "logger", "gradients", "paths")  # parts of a config that may be set for all runs
CLAIMS = ROOT / "conf" / "claims.yaml"

Make = Callable[[dict[str, Any], "Job"], None]


@dataclass(frozen=True)
class Job:
    """How to make a table or figure: scale, folders, whether to run what is missing, and how."""

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
        """Run those of these runs that are missing, and return the failed ones; wanted: overrides of each run."""
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
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=f"for all runs; of {', '.join(ON_WHAT)}")
    return parser


def planner(extra: Sequence[str]) -> Planner:
    """A function from overrides to a run, on the hardware and paths of `extra`."""
    return partial(plan, extra=tuple(extra))


def shared(scale: str, words: Sequence[str]) -> Config:
    """A config with what all runs share, such as folders and trainer. Raises UserError for overrides that change results."""
    for word in words:
        key = re.split("[.=]", word.lstrip("+~"), maxsplit=1)[0]
        if key == "launcher":
            raise UserError(
                f"{word}: choose a launcher with LAUNCHER=slurm; SET='launcher.KEY=VALUE' works for tables and figures"
            )
        if key not in ON_WHAT:
            raise UserError(
                f"{word}: only {', '.join(ON_WHAT)} can be set here, because conf/ defines the runs of tables and figures; "
                f"for a run of your own, type python run.py experiment=... {word}"
            )
    return compose_run(["experiment=teacher", f"scale={scale}", *words])


def make_all(kind: str, make: Make, about: str | None) -> None:
    """Make the tables or figures that the command line names, by default all that can be made."""
    parser = arguments(about)
    parser.add_argument("numbers", nargs="*", help=f"{kind}s to make, such as 2.1; default: all")
    parser.add_argument("--workers", type=int, default=min(2, cpu_count()))
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--launcher", default="local", help="a file of conf/launcher: local or slurm; --set takes its keys")
    given = parser.parse_args()
    with honest():
        of_launcher = [word for word in given.set if word.startswith("launcher.")]
        extra = [word for word in given.set if word not in of_launcher]
        config = shared(given.scale, extra)
        if given.workers < 1:
            raise UserError(f"WORKERS={given.workers}: expected 1 or more; --render-only runs nothing")
        if given.workers > 1:
            refuse_many_devices(config)
        launcher = make_launcher(given.launcher, of_launcher)
        job = Job(given.scale, Paths.of(config), not given.render_only, given.workers, extra, launcher)
        for part in [part for number in given.numbers for part in specs.parts(kind, number)]:
            make(specs.load(kind, part), job)
        if not given.numbers and not make_every(kind, make, job) and job.trains:
            sys.exit(1)


def make_every(kind: str, make: Make, job: Job) -> bool:
    """Make all tables or figures of the scale, printing errors; return whether there were none."""
    complete = True
    for spec in specs.at_scale(kind, job.scale).values():
        try:
            make(spec, job)
        except UserError as error:
            print(error)
            complete = False
    return complete


def report(files: Iterable[Path], failures: Sequence[Failure]) -> None:
    """Print the files that were written. Raises UserError with the commands of failed runs."""
    if written := [shown(file) for file in files]:
        print("written:", *written)
    if failures:
        failed = "\n".join(f"  {failure.command}   (log: {shown(failure.log)})" for failure in failures)
        raise UserError(f"{len(failures)} run{'s' * (len(failures) > 1)} failed; fix and retry:\n{failed}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
