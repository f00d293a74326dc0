"""make table-2.1 SCALE=cpu: runs what is missing, renders, prints.   --render-only trains nothing."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from gradexp.errors import UserError
from gradexp.report import tables
from gradexp.runs import ROOT, Paths
from gradexp.tasks.compose import compose_run, plan
from gradexp.tasks.many import missing, run_all

SPECS = ROOT / "conf" / "table"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", help="tables to make, such as 2.1; all of them when none is named")
    parser.add_argument("--scale", default="cpu")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--render-only", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of trainer, logger or paths, for every run")
    arguments = parser.parse_args()
    paths = Paths.of(compose_run(["experiment=teacher", *arguments.set]))
    for number in arguments.numbers or sorted(file.stem for file in SPECS.glob("*.yaml")):
        make(load(number), arguments.scale, paths, 0 if arguments.render_only else arguments.workers, arguments.set)


def load(number: str) -> dict[str, Any]:
    """The table's spec. Raises UserError when there is none."""
    file = SPECS / f"{number}.yaml"
    if not file.exists():
        there = ", ".join(sorted(spec.stem for spec in SPECS.glob("*.yaml")))
        raise UserError(f"no table {number}: conf/table/ has {there}")
    spec: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return spec


def make(spec: dict[str, Any], scale: str, paths: Paths, workers: int, extra: list[str]) -> None:
    """Runs what is missing with `workers` processes (none for 0), then writes and prints the table."""
    runs = [plan(overrides) for *_, seeds in tables.cells_of(spec, scale) for overrides in seeds]
    failures = []
    if workers and (absent := missing(runs, paths)):
        print(f"table {spec['number']}, scale={scale}: {len(absent)} of {len(runs)} runs are missing", flush=True)
        failures = run_all(absent, paths, workers=workers, extra=extra)
    table = tables.build(spec, scale, plan, paths)
    files = tables.write(table, paths.results)
    print(tables.to_text(table))
    print("written:", *(shown(file) for file in files))
    if failures:
        failed = "\n".join(f"  {failure.command}   (log: {shown(failure.log)})" for failure in failures)
        raise UserError(f"{len(failures)} runs failed; mend and retry:\n{failed}")


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
