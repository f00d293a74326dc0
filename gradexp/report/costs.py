"""The missing runs of tables and figures, and an estimate of their cost on this machine.

Estimates come from records of similar runs (same task, networks, loss terms, method and image size), scaled by the number of
images that they process, or else from operation counts (scripts/operations.py), which are marked with ~.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from gradexp.base.errors import UserError
from gradexp.engine.record import Clock, Images, Record, read_record
from gradexp.engine.run import Config, Paths, Run, identity, record_files
from gradexp.engine.task import Sizes, task_of
from gradexp.report import specs
from gradexp.report.provenance import own_seconds
from gradexp.report.specs import Planner
from gradexp.report.writing import printed, rendered

NEAREST = 5  # an estimate is the median over so many similar runs


def signature(config: Config) -> str:
    """What determines the cost of an image, as JSON: runs with the same signature differ only in the number of images.

    Seed, subset, schedule, and weights and other fractional constants of terms are left out.
    """
    config = identity(config)  # without null settings, which older records lack
    data, terms = config.get("data", {}), config.get("method", {}).get("terms", {})
    content = {
        "task": config["task"]["_target_"],
        "model": _network(config),
        "upstream": {name: _network(run) for name, run in config["upstream"].items() if _network(run)},
        "terms": {
            name: {key: value for key, value in term.items() if key != "weight" and not isinstance(value, float)}
            for name, term in terms.items()
        },
        "images": [data.get("channels"), data.get("size"), data.get("crop"), data.get("flip")],
        "batch": config.get("optim", {}).get("batch_size"),
        "saliency": config.get("saliency"),
        "evaluate": {key: value for key, value in config.get("evaluate", {}).items() if key != "images"},
    }
    return json.dumps(content, sort_keys=True)


def _network(config: Config) -> Config:
    return {key: value for key, value in config.get("model", {}).items() if key not in ("name", "dropout")}


# --- what similar runs cost --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a finished run cost. seconds: of one processor; rate: those among them that each image takes."""

    signature: str
    amount: float
    seconds: float
    rate: float
    memory_mib: float
    disk_mib: float
    device: str

    def at(self, amount: float) -> float:
        return max(0.0, self.seconds - self.rate * self.amount) + self.rate * amount


@dataclass(frozen=True)
class Cost:
    """An estimate. seconds: of one processor; basis: `record`, `record elsewhere` (of another machine) or `count`."""

    seconds: float
    memory_mib: float
    disk_mib: float
    basis: str


@dataclass
class History:
    """All known costs.

    device: this machine's, as records name it; clock: `cpu`, or `wall` for GPUs; sizes: of data sets; counts: what operation
    counts give, by signature, for runs without a similar one; configs: of one run of each signature.
    """

    device: str | None = None
    clock: Clock = "cpu"
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: dict[str, Sample] = field(default_factory=dict)
    configs: dict[str, Config] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Paths, device: str | None = None, clock: Clock = "cpu") -> History:
        """Read the records of all scales; one that can't be read is named and left out, as costs do not depend on it."""
        history = cls(device, clock)
        records = []
        for file in record_files(paths.results):
            try:
                records.append(read_record(file))
            except UserError as error:
                print(f"left out of the estimates: {error}", file=sys.stderr)
        for record in records:
            history.learn(record["config"], record.get("data", {}))
        known = {record["id"]: record for record in records}
        for record in records:
            folder = paths.outputs / "runs" / record["experiment"] / record["id"]
            try:
                learned = sample(record, history.sizes, known, folder, clock)
            except UserError as error:  # a task of somebody's own, without its package
                print(f"left out of the estimates: {record['experiment']} {record['id']}: {error}", file=sys.stderr)
                continue
            if learned:
                history.add(learned)
                history.configs[learned.signature] = record["config"]
        return history

    def learn(self, config: Config, data: Images) -> None:
        """Note the size of a data set that was used completely."""
        settings = config.get("data", {})
        whole = all(settings.get(key) is None for key in ("per_class", "validation", "only_classes"))
        if whole and "train_images" in data:
            self.sizes[data["name"]] = data["train_images"], data["test_images"]

    def add(self, sample: Sample) -> None:
        self.samples.setdefault(sample.signature, []).append(sample)

    def cost(self, config: Config) -> Cost | None:
        """The median over the similar runs that are nearest in size, of this machine if it has any; None if unknown."""
        size, name = task_of(config).work(config, self.sizes), signature(config)
        counted = [self.counts[name]] if name in self.counts else []
        similar = self.samples.get(name) or counted
        if size is None or not similar:
            return None
        here = [sample for sample in similar if self.device in (None, sample.device)]
        near = sorted(here or similar, key=lambda sample: abs(math.log(sample.amount / size)))[:NEAREST]
        basis = "count" if similar is counted else "record" if here else "record elsewhere"
        disk = task_of(config).leaves(config, self.sizes)
        return Cost(
            seconds=statistics.median(sample.at(size) for sample in near),
            memory_mib=max(sample.memory_mib for sample in near),
            disk_mib=max(sample.disk_mib for sample in near) if disk is None else disk,
            basis=basis,
        )


def sample(record: Record, sizes: Sizes, known: Mapping[str, Record], folder: Path, clock: Clock = "cpu") -> Sample | None:
    """The sample of a record; None if its amount is unknown or it diverged.

    known: records by id. Disk: the content of `folder` if it still exists, otherwise the weights.
    """
    size = task_of(record["config"]).work(record["config"], sizes)
    if size is None or record["status"] != "finished":
        return None
    busy, wall = max(0.01, own_seconds(record, known, clock)), max(0.01, own_seconds(record, known, "wall"))
    speed = record.get("images_per_second")
    rate = min(busy / size, busy / wall / speed) if speed else busy / size
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    disk = (kept or 4 * record.get("parameters", 0)) / 2**20
    memory, device = float(record["peak_memory_mib"]), record.get("device", "")
    return Sample(signature(record["config"]), size, busy, rate, memory, disk, device)


# --- tables and figures -----------------------------------------------------------------------------------


def items(scale: str) -> dict[str, list[list[str]]]:
    """{table or figure: overrides of each of its runs} of all that the scale has."""
    return {name: specs.commands(spec, scale) for name, spec in specs.every(scale).items()}


def build(scale: str, plan: Planner, history: History) -> pd.DataFrame:
    """A row for each table and figure of the scale, and a last one, `all`; each run counts once, upstream runs too.

    Columns: name; present, missing, shared (runs that other tables or figures need, too), rebuilt (runs with a record whose
    product is missing on this disk and needed by a missing run); of all that is to be done seconds of one processor,
    memory_mib of the largest run, disk_mib, bases (how many costs have which basis) and unknown (runs of unknown cost, which
    the sums leave out).
    """
    needs = {name: needed(map(plan, overrides)) for name, overrides in items(scale).items()}
    if not needs:
        raise UserError(f"scale={scale}: no table or figure has it; expected paper, cpu or quick")
    times = Counter(run for runs in needs.values() for run in runs)
    needs["all"] = {run: any(runs.get(run) for runs in needs.values()) for run in times}
    costs = {run: history.cost(run.config) for run, to_do in needs["all"].items() if to_do}
    rows = []
    for name, runs in needs.items():
        missing = [run for run in runs if not run.finished]
        todo = [run for run, to_do in runs.items() if to_do]
        known = [cost for run in todo if (cost := costs[run])]
        rows.append(
            {
                "name": name,
                "present": len(runs) - len(missing),
                "missing": len(missing),
                "shared": sum(times[run] > 1 for run in runs),
                "rebuilt": len(todo) - len(missing),
                "seconds": sum(cost.seconds for cost in known),
                "memory_mib": max((cost.memory_mib for cost in known), default=0.0),
                "disk_mib": sum(cost.disk_mib for cost in known),
                "bases": Counter(cost.basis for cost in known),
                "unknown": [run for run in todo if not costs[run]],
            }
        )
    return pd.DataFrame(rows)


def needed(runs: Iterable[Run]) -> dict[Run, bool]:
    """These runs and all runs upstream of them; whether each is to do.

    It is if it has no record, or if a missing run needs its product, which is not on this disk.
    """
    needs: dict[Run, bool] = {}

    def visit(run: Run, product_needed: bool) -> None:
        to_do = not run.finished or (product_needed and not (run.folder / task_of(run.config).product).exists())
        if run not in needs or to_do > needs[run]:
            needs[run] = to_do
            for below in run.upstream.values():
                visit(below, to_do)

    for run in runs:
        visit(run, False)
    return needs


# --- text -------------------------------------------------------------------------------------------------


def to_text(rows: pd.DataFrame, scale: str, slots: int, device: str, free_gib: float) -> str:
    """The plan for the terminal."""
    table = printed(to_frame(rows, slots)).rstrip()
    return rendered("plan.txt", table=table, total=rows.iloc[-1], scale=scale, slots=slots, device=device, free_gib=free_gib)


def to_frame(rows: pd.DataFrame, slots: int) -> pd.DataFrame:
    """The rows as text; hours if `slots` processors are busy all the time."""
    return pd.DataFrame([_texts(row, slots) for row in rows.itertuples()])


def _texts(row: Any, slots: int) -> dict[str, str]:
    least = "≥ " if row.unknown else ""  # sums leave out runs of unknown cost
    least += "~" if "count" in row.bases else ""
    names = {"record elsewhere": "records elsewhere", "record": "records", "count": "counts"}
    known = ", ".join(f"{count} {basis if count == 1 else names[basis]}" for basis, count in sorted(row.bases.items()))
    unknown = f"{len(row.unknown)} unknown" if row.unknown else ""
    return {
        "": row.name,
        "present": str(row.present or ""),
        "missing": str(row.missing or ""),
        "shared": str(row.shared or ""),
        "hours": f"{least}{row.seconds / 3600 / slots:.2f}" if row.bases else "",
        "memory": f"{least}{row.memory_mib / 1024:.1f} GiB" if row.bases else "",
        "disk": f"{least}{row.disk_mib:.0f} MiB" if row.bases else "",
        "known from": "; ".join(filter(None, [known, unknown])),
    }
