"""What is missing of the tables and figures, and what it costs on this machine, before anything runs.

Costs come from records of like runs: the same task, networks, loss terms, method and image size, scaled by the images that
they process; or from probes, which are such runs cut short (scripts/probe.py). What neither knows is said to be unknown.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gradexp.base.errors import UserError
from gradexp.engine.record import read_record
from gradexp.engine.run import Config, Paths, Run, identity
from gradexp.engine.task import Sizes, task_of
from gradexp.report import specs
from gradexp.report.provenance import own_seconds
from gradexp.report.specs import Planner

NEAREST = 5  # like records that an estimate is the median of


# --- how much work ----------------------------------------------------------------------------------------


def amount(config: Config, sizes: Sizes) -> float | None:
    """How many images a run processes, in units of its own task; None where the size of its data set is not known yet."""
    return task_of(config).work(config, sizes)


def signature(config: Config) -> str:
    """What decides the cost of processing an image: runs with one signature differ in amount only.

    Weights and other real constants of terms are left out, as are seed, subset and schedule.
    """
    config = identity(config)  # a switch that was added later is null, and left out
    data, terms = config.get("data", {}), config.get("method", {}).get("terms", {})
    evaluate = {key: value for key, value in config.get("evaluate", {}).items() if key != "images"}
    what = {
        "task": config["task"]["_target_"],
        "model": _network(config),
        "upstream": {name: _network(run) for name, run in config["upstream"].items() if _network(run)},
        "terms": {name: _shape(term) for name, term in terms.items()},
        "images": [data.get("channels"), data.get("size"), data.get("crop"), data.get("flip")],
        "batch": config.get("optim", {}).get("batch_size"),
        "saliency": config.get("saliency"),
        "evaluate": evaluate,
    }
    return json.dumps(what, sort_keys=True)


def _network(config: Config) -> Config:
    return {key: value for key, value in config.get("model", {}).items() if key not in ("name", "dropout")}


def _shape(term: Config) -> Config:
    return {key: value for key, value in term.items() if key != "weight" and not isinstance(value, float)}


# --- what like runs cost ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What a finished run cost: processor seconds; rate: of them, those for each image."""

    signature: str
    amount: float
    seconds: float
    rate: float
    memory_mib: float
    disk_mib: float
    device: str
    probe: bool = False

    def at(self, amount: float) -> float:
        return max(0.0, self.seconds - self.rate * self.amount) + self.rate * amount


@dataclass(frozen=True)
class Cost:
    """seconds: of one processor. basis: `record`, `record elsewhere` (of another machine) or `probe`."""

    seconds: float
    memory_mib: float
    disk_mib: float
    basis: str


@dataclass
class History:
    """Everything that is known of costs; device: this machine's, as records name it; clock: `cpu`, or `wall` for GPUs."""

    device: str | None = None
    clock: str = "cpu"
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Paths, device: str | None = None, clock: str = "cpu") -> History:
        """From the records of all scales, and from the probes kept under outputs/probes/."""
        history = cls(device, clock)
        records = [read_record(file) for file in sorted(paths.results.glob("runs/*/*.json"))]
        for record in records:
            history.learn(record["config"], record.get("data", {}))
        known = {record["id"]: record for record in records}
        for record in records:
            folder = paths.outputs / "runs" / record["experiment"] / record["id"]
            history.add(sample(record, history.sizes, known, folder, clock))
        for file in sorted(paths.outputs.glob("probes/*.json")):
            probe = json.loads(file.read_text(encoding="utf-8"))
            history.add(Sample(**probe["sample"]))
            history.sizes |= {name: tuple(size) for name, size in probe["sizes"].items() if name not in history.sizes}
        return history

    def learn(self, config: Config, data: Config) -> None:
        """The size of a data set that was used whole."""
        if config.get("data", {}).get("per_class") is None and "train_images" in data:
            self.sizes[data["name"]] = data["train_images"], data["test_images"]

    def add(self, sample: Sample | None) -> None:
        if sample:
            self.samples.setdefault(sample.signature, []).append(sample)

    def cost(self, config: Config) -> Cost | None:
        """The median of what the like runs of nearest amount say; those of this machine before those of others."""
        size, like = amount(config, self.sizes), self.samples.get(signature(config), [])
        if size is None or not like:
            return None
        here = [one for one in like if self.device in (None, one.device)]
        measured = [one for one in here if not one.probe] or here or like
        near = sorted(measured, key=lambda one: abs(math.log(one.amount / size)))[:NEAREST]
        basis = "probe" if near[0].probe else "record" if here else "record elsewhere"
        seconds, memory = statistics.median(one.at(size) for one in near), max(one.memory_mib for one in near)
        leaves = task_of(config).leaves(config, self.sizes)
        disk = max(one.disk_mib for one in near) if leaves is None else leaves
        return Cost(seconds, memory, disk, basis)


def sample(record: Config, sizes: Sizes, known: Mapping[str, Config], folder: Path, clock: str = "cpu") -> Sample | None:
    """What a record says of costs; None where its amount is not known, or it diverged.

    Disk is what is in its `folder`, where that is still there, and otherwise the weights.
    """
    size = amount(record["config"], sizes)
    if size is None or record["status"] != "finished":
        return None
    busy, wall = (max(0.01, own_seconds(record, known, name)) for name in (clock, "wall"))
    speed = record.get("images_per_second")
    rate = min(busy / size, busy / wall / speed) if speed else busy / size
    kept = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    disk = (kept or 4 * record.get("parameters", 0)) / 2**20
    memory, device = float(record["peak_memory_mib"]), record.get("device", "")
    return Sample(signature(record["config"]), size, busy, rate, memory, disk, device)


LADDER = (1, 4, 16)  # what runs that look at models are cut to


def probed_training(config: Config, probe: Config, history: History) -> Sample:
    """The sample of a training whose first steps were probed (scripts/probe.py).

    A teacher's targets are counted by the image: the more images a run shows, the more views of them it needs.
    """
    history.learn(config, probe["data"])
    size = amount(config, history.sizes) or 1.0
    ready, image, judged = (probe["seconds"][name][history.clock] for name in ("ready", "image", "judge"))
    rate = image + (ready / size if "teacher" in config["upstream"] else 0.0)
    facts = float(probe["peak_memory_mib"]), 4 * probe["parameters"] / 2**20, probe["device"]
    return Sample(signature(config), size, ready + image * size + judged, rate, *facts, probe=True)


def probed_looking(config: Config, records: Sequence[Config], history: History) -> Sample:
    """The sample of a run that was cut to the LADDER: what the first takes once, and what the third takes beyond the second."""
    history.learn(config, records[0]["data"])
    sizes = [amount(record["config"], history.sizes) or 1.0 for record in records]
    seconds = [record["seconds"][history.clock] for record in records]
    rate = max(0.0, (seconds[2] - seconds[1]) / (sizes[2] - sizes[1]))
    facts = float(records[-1]["peak_memory_mib"]), 0.0, records[0]["device"]
    return Sample(signature(config), sizes[0], seconds[0], rate, *facts, probe=True)


# --- tables and figures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A table or figure, or all of them. Counts are of runs, those that others stand on among them, each once.

    shared: with other tables and figures; rebuilt: they have a record, but what others need of them is not on this disk.
    """

    name: str
    present: int
    missing: int
    shared: int
    rebuilt: int
    seconds: float
    memory_mib: float
    disk_mib: float
    bases: Mapping[str, int]
    unknown: tuple[Run, ...]  # runs of which nothing is known: they count for nothing above

    def hours(self, slots: int) -> float:
        """On a machine with so many processors, all of them at work."""
        return self.seconds / 3600 / slots


def items(scale: str) -> dict[str, list[list[str]]]:
    """{table or figure: what to type for each of its runs} of all that the scale has."""
    found = {}
    for kind in specs.KINDS:
        for number, spec in specs.at_scale(kind, scale).items():
            found[f"{kind} {number}"] = [words for cell in specs.cells(spec, scale) for words in cell.commands.values()]
    return found


def build(scale: str, plan: Planner, history: History) -> list[Row]:
    """A row for each table and figure of the scale, and one for all of them, last."""
    if not (found := items(scale)):
        raise UserError(f"scale={scale}: no table or figure has it; there are paper, cpu and quick")
    needs = {name: needed([plan(words) for words in typed]) for name, typed in found.items()}
    times = Counter(run for runs in needs.values() for run in runs)
    needs["all"] = {run: need for runs in needs.values() for run, need in runs.items()}  # every run once
    return [_row(name, runs, times, history) for name, runs in needs.items()]


@dataclass(frozen=True)
class Need:
    run: Run
    present: bool  # has a record
    to_do: bool  # has none, or lacks what a missing run needs of it


def needed(runs: Iterable[Run]) -> dict[str, Need]:
    """These runs and all runs upstream of them, by id."""
    found: dict[str, Need] = {}

    def visit(run: Run, wanted: bool) -> None:
        """wanted: a run that is to be done needs this one's product."""
        to_do = not run.finished or (wanted and not (run.folder / task_of(run.config).product).exists())
        if run.id in found and (found[run.id].to_do or not to_do):
            return
        found[run.id] = Need(run, run.finished, to_do)
        for below in run.upstream.values():
            visit(below, to_do)

    for run in runs:
        visit(run, False)
    return found


def _row(name: str, needs: Mapping[str, Need], times: Mapping[str, int], history: History) -> Row:
    """times: in how many tables and figures a run is."""
    costs = [(need, history.cost(need.run.config)) for need in needs.values() if need.to_do]
    known = [cost for _, cost in costs if cost]
    return Row(
        name=name,
        present=sum(need.present for need in needs.values()),
        missing=sum(not need.present for need in needs.values()),
        shared=sum(times[run] > 1 for run in needs),
        rebuilt=sum(need.present and need.to_do for need in needs.values()),
        seconds=sum(cost.seconds for cost in known),
        memory_mib=max((cost.memory_mib for cost in known), default=0.0),
        disk_mib=sum(cost.disk_mib for cost in known),
        bases=Counter(cost.basis for cost in known),
        unknown=tuple(need.run for need, cost in costs if cost is None),
    )


# --- pages ------------------------------------------------------------------------------------------------

HEADS = ("", "present", "missing", "shared", "hours", "memory", "disk", "known from")


def to_text(rows: Sequence[Row], scale: str, slots: int, device: str, free_gib: float) -> str:
    """For the terminal, and as it stands for a page."""
    lines = [HEADS, *(_cells(row, slots) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:-1], widths[1:-1], strict=True)), line[-1]])
        for line in lines
    ]
    rule = "-" * max(map(len, shown))
    total = rows[-1]
    notes = [
        f"Hours: on this machine ({slots} x {device}) with every one of its {slots} processors at a run of its own; the",
        "table's own, as if no other shared its runs. Memory: of the largest run. Disk: what runs leave; it has "
        f"{free_gib:.0f} GiB free.",
        "A teacher's targets, up to trainer.store_gib for each of its data subsets, come on top, and can be deleted.",
    ]
    if total.rebuilt:
        notes.append(f"Runs with a record that must be repeated, because their weights or maps were deleted: {total.rebuilt}.")
    if total.unknown:
        notes.append(
            f"Of {len(total.unknown)} runs nothing is known, and nothing counted: make plan SCALE={scale} ARGS=--probe"
        )
    title = f"What scale={scale} has and lacks"
    return "\n".join([title, rule, shown[0], rule, *shown[1:-1], rule, shown[-1], rule, *notes]) + "\n"


def to_table(rows: Sequence[Row], slots: int) -> list[dict[str, str]]:
    """For a page: one entry a row, by column."""
    heads = [f"hours, {slots} runs at a time" if head == "hours" else head for head in HEADS]
    return [dict(zip(heads, _cells(row, slots), strict=True)) for row in rows]


def _cells(row: Row, slots: int) -> list[str]:
    plural = {"record": "records", "probe": "probes", "record elsewhere": "records elsewhere"}
    known = ", ".join(f"{count} {basis if count == 1 else plural[basis]}" for basis, count in sorted(row.bases.items()))
    unknown = [f"{len(row.unknown)} unknown"] if row.unknown else []
    counts = [str(count) if count else "" for count in (row.present, row.missing, row.shared)]
    least = "≥ " if row.unknown else ""  # runs of which nothing is known are not in the sums
    sums = [f"{row.hours(slots):.2f}", f"{row.memory_mib / 1024:.1f} GiB", f"{row.disk_mib:.0f} MiB"]
    costs = [least + value for value in sums] if row.bases else [""] * 3
    return [row.name, *counts, *costs, "; ".join([*([known] if known else []), *unknown])]
