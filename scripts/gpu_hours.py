"""python scripts/gpu_hours.py: what GPU-hours would reproduce at scale=paper, to docs/gpu_hours.md; computed, not measured."""

import argparse
from collections.abc import Mapping, Sequence

import operations
from common import planner
from operations import H100, START, Unit
from reproduce import priorities

from gradexp.base.files import write_atomically
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import ROOT, Run
from gradexp.engine.task import task_of
from gradexp.report import costs
from gradexp.report.writing import table_lines

HOURS = (1, 10, 100)
COLUMNS = ["table", "hours", "training", "student", "GFLOP per image", "MB per image", "operations per step", "batch"]
COLUMNS += ["precision", "computed ms per step"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with exit_on_errors():
        plan = planner([])
        items = {name: [plan(words) for words in commands] for name, commands in costs.items("paper").items()}
        every = {run.id: run for run in costs.needed(run for runs in items.values() for run in runs)}
        kinds = {costs.signature(run.config): run.config for run in every.values()}
        units = operations.counts(kinds, operations.STORE)
        seconds = {name: seconds_of(run, units[costs.signature(run.config)]) for name, run in every.items()}
        text = "\n".join([*head(), *steps(items, units, seconds), *hours(items, seconds), ""])
        write_atomically(ROOT / "docs" / "gpu_hours.md", text.encode())
        print(text)


def seconds_of(run: Run, unit: Unit) -> float:
    return START + (task_of(run.config).work(run.config, operations.SIZES) or 0.0) * unit.gpu_seconds


def head() -> list[str]:
    speeds = "; ".join(
        f"{gpu.name.split(', ')[1]}: {gpu.tflops:g} TFLOP/s and {gpu.gbytes:g} GB/s, "
        f"{100 * gpu.share:.0f} % of which are reached"
        for gpu in H100.values()
    )
    return [
        "# What GPU-hours would reproduce",
        "",
        "**Computed from operation counts, not measured**: no GPU has run any of this. `python scripts/gpu_hours.py` "
        "writes this page; `make gpu-check` measures.",
        "",
        "Assumptions:",
        "",
        f"- A GPU of the H100 class. {speeds}; kernels are launched at least {H100['bf16'].launch * 1e6:.0f} µs "
        "apart, which is what Python needs. An operation takes the longest of compute time, "
        "memory time and this interval.",
        "- Trainings compute in bf16, except those of Chapter 5, whose models are compared with each other and all use fp32; "
        "everything else computes in fp32 without TF32.",
        "- Each operation reads its inputs and writes its outputs once, counted as fp32; bf16 halves most of it. "
        "A teacher's targets are computed for every batch, "
        "although stored ones save that. The optimizer and the loading of images are left out.",
        f"- Every run takes {START:.0f} s more, and one run is done at a time.",
        "",
    ]


def steps(items: Mapping[str, Sequence[Run]], units: Mapping[str, Unit], seconds: Mapping[str, float]) -> list[str]:
    """A line for each method and student of each table and of its upstream runs, in the reading with the slowest step."""
    rows: list[list[str]] = []
    for item, runs in items.items():
        if not item.startswith("table"):
            continue
        needed = list(costs.needed(runs))
        slowest: dict[tuple[str, str], Unit] = {}
        for run in needed:
            if "optim" in run.config:
                kind = (f"{run.name} {run.config['method']['name']}", run.config["model"]["name"])
                unit = units[costs.signature(run.config)]
                slowest[kind] = max(unit, slowest.get(kind, unit), key=step_seconds)
        first = [item, f"{sum(seconds[run.id] for run in needed) / 3600:.1f}"]
        for number, (kind, unit) in enumerate(slowest.items()):
            rows.append([*(["", ""] if number else first), *kind, *numbers_of(unit)])
    title = ["## The steps of each table", "", "Hours are those of the whole table with its upstream runs.", ""]
    return [*title, *table_lines(COLUMNS, rows), ""]


def step_seconds(unit: Unit) -> float:
    return unit.gpu_seconds * unit.batch


def numbers_of(unit: Unit) -> list[str]:
    sizes = [f"{unit.flops / 1e9:.2f}", f"{unit.bytes / 1e6:.0f}", f"{unit.launches}", f"{unit.batch:.0f}"]
    return [*sizes, unit.precision, f"{1e3 * step_seconds(unit):.1f}"]


def hours(items: Mapping[str, Sequence[Run]], seconds: Mapping[str, float]) -> list[str]:
    """What fits into 1, 10 and 100 hours, most wanted first (conf/budget.yaml)."""
    ranked = priorities("paper", planner([]))

    def parts(run: Run) -> list[str]:
        return [run.id, *(name for below in run.upstream.values() for name in parts(below))]

    order = sorted(ranked, key=lambda run: (ranked[run], sum(seconds[name] for name in set(parts(run)))))
    total = sum(seconds.values()) / 3600
    lines = ["## One GPU-hour, ten, and a hundred", "", f"All {len(seconds)} runs of scale=paper take {total:.0f} hours.", ""]
    for limit in HOURS:
        done, left = set[str](), 3600.0 * limit
        for run in order:
            new = set(parts(run)) - done
            if (cost := sum(seconds[name] for name in new)) <= left:
                done, left = done | new, left - cost
        complete = [item for item, runs in items.items() if all(run.id in done for run in runs)]
        shares = {item: sum(run.id in done for run in runs) / len(runs) for item, runs in items.items()}
        begun = [f"{item} ({100 * share:.0f} %)" for item, share in shares.items() if 0 < share < 1]
        lines += [
            f"**{limit} hour{'s' * (limit > 1)}**: {len(done)} runs. Complete: {', '.join(complete) or 'nothing'}. "
            f"In part: {', '.join(begun) or 'nothing'}.",
            "",
        ]
    return lines


if __name__ == "__main__":
    main()
