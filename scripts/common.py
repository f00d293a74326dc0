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

ON_WHAT = ("trainer", "logger", "gradients", "paths")  # what of a config may be set for all runs
CLAIMS = ROOT / "conf" / "claims.yaml"

Make = Callable[[dict[str, Any], "Job"], None]


@dataclass(frozen=True)
class Job:
    """At which scale, where, whether runs may be done, and with how many workers and which hardware overrides."""

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
        """Runs what is missing of the runs that these overrides stand for; returns those that failed."""
        runs = [self.plan(overrides) for overrides in dict.fromkeys(map(tuple, wanted))]
        absent = missing(runs) if self.trains else []
        if not absent:
            return []
        below = sum(map(len, generations(absent))) - len(absent)
        upstream = f", and {below} upstream" if below else ""
        print(f"{title}, scale={self.scale}: {len(absent)} of {len(runs)} runs are missing{upstream}", flush=True)
        return run_all(absent, workers=self.workers, extra=self.extra, launcher=self.launcher)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """A parser with what all scripts take."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help=f"for all runs; of {', '.join(ON_WHAT)}")
    return parser


def planner(extra: Sequence[str]) -> Planner:
    """From overrides to a run, on the hardware and paths that `extra` names."""
    return partial(plan, extra=tuple(extra))


def shared(scale: str, words: Sequence[str]) -> Config:
    """What holds for all runs: where files are, and on what they run. Raises UserError for a word that decides numbers."""
    for word in words:
        key = re.split("[.=]", word.lstrip("+~"), maxsplit=1)[0]
        if key == "launcher":
            raise UserError(f"{word}: LAUNCHER=slurm chooses one, SET='launcher.KEY=VALUE' its settings, of tables and figures")
        if key not in ON_WHAT:
            raise UserError(
                f"{word}: only {', '.join(ON_WHAT)} can be set here, as tables and figures name their runs in conf/; "
                f"for a run of your own type python run.py experiment=... {word}"
            )
    return compose_run(["experiment=teacher", f"scale={scale}", *words])


def make_all(kind: str, make: Make, about: str | None) -> None:
    """Makes the tables or figures that the command line names; all of them when it names none, as far as they can be made."""
    parser = arguments(about)
    parser.add_argument("numbers", nargs="*", help=f"{kind}s to make, such as 2.1; all of them when none is named")
    parser.add_argument("--workers", type=int, default=min(2, cpu_count()))
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--launcher", default="local", help="a file of conf/launcher: local or slurm; --set takes its keys")
    given = parser.parse_args()
    with honest():
        of_launcher = [word for word in given.set if word.startswith("launcher.")]
        extra = [word for word in given.set if word not in of_launcher]
        config = shared(given.scale, extra)
        if given.workers < 1:
            raise UserError(f"WORKERS={given.workers}: it is 1 or more; --render-only does no run")
        if given.workers > 1:
            refuse_many_devices(config)
        launcher = make_launcher(given.launcher, of_launcher)
        job = Job(given.scale, Paths.of(config), not given.render_only, given.workers, extra, launcher)
        for part in [part for number in given.numbers for part in specs.parts(kind, number)]:
            make(specs.load(kind, part), job)
        if not given.numbers and not make_every(kind, make, job) and job.trains:
            sys.exit(1)


def make_every(kind: str, make: Make, job: Job) -> bool:
    """All tables or figures that the scale has; says what is wrong with one and goes on. Whether all was well."""
    well = True
    for spec in specs.at_scale(kind, job.scale).values():
        try:
            make(spec, job)
        except UserError as error:
            print(error)
            well = False
    return well


def report(files: Iterable[Path], failures: Sequence[Failure]) -> None:
    """Says what was written. Raises UserError naming the runs that failed."""
    if written := [shown(file) for file in files]:
        print("written:", *written)
    if failures:
        failed = "\n".join(f"  {failure.command}   (log: {shown(failure.log)})" for failure in failures)
        raise UserError(f"{len(failures)} run{'s' * (len(failures) > 1)} failed; fix and retry:\n{failed}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
