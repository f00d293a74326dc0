"""Records that no table or figure of their scale shows: of settings that were replaced, or of runs by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from textwrap import shorten

from gradexp.engine.record import Record, numbers_of, read_record
from gradexp.engine.run import Config, Run, record_files
from gradexp.report import provenance, specs
from gradexp.report.specs import Planner, label_of

LISTED = 4  # differences of a record
LENGTH = 48  # characters of a setting
NUMBERS = 5  # of a record without the metric that its config names `objective`
SPREADS = ("/std", "/low", "/high")


@dataclass(frozen=True)
class Unshown:
    """A record, the planned run that is nearest to it, and {setting: (here, there)} where the two differ.

    nearest: where it belongs, such as `table 2.1, Cross-Entropy (CE), 5`; "" if no run of the experiment is planned.
    """

    record: Record
    nearest: str
    differences: dict[str, tuple[str, str]]

    @property
    def numbers(self) -> str:
        found = {name: value for name, value in numbers_of(self.record).items() if not name.endswith(SPREADS)}
        objective = self.record["config"].get("objective")
        names = [objective] if objective in found else list(found)
        return _shortened([f"{name} {'NaN' if found[name] is None else f'{found[name]:.5g}'}" for name in names], NUMBERS)

    @property
    def departures(self) -> str:
        pairs = {key: _shortened_pair(pair) for key, pair in self.differences.items()}
        listed = [f"`{key}` {here} (there {there})" for key, (here, there) in pairs.items()]
        return _shortened(listed, LISTED) or ("nothing: the run that uses it is missing" if self.nearest else "")


def _shortened_pair(pair: tuple[str, str]) -> list[str]:
    """Both texts, from the word in which they differ if one is long."""
    same = "".join(one for one, other in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
    start = same.rfind(" ") + 1 if max(map(len, pair)) > LENGTH else 0
    return [shorten("… " * (start > 0) + text[start:], LENGTH, placeholder=" …") for text in pair]


def _shortened(texts: list[str], limit: int) -> str:
    return "; ".join([*texts[:limit], *([f"and {len(texts) - limit} more"] if len(texts) > limit else [])])


def find(scale: str, plan: Planner, results: Path) -> list[Unshown]:
    """The records of a scale in results/runs that no table or figure uses, not even upstream."""
    planned = _planned(scale, plan)
    used = {run.id for run in provenance.with_upstream(run for run, (_, upstream) in planned.items() if not upstream)}
    files = [file for file in record_files(results) if file.is_relative_to(results / "runs") and file.stem not in used]
    there = [(run.name, name, _sorted(run.config)) for run, (name, _) in planned.items()]
    found = [_compared(record, there) for record in map(read_record, files) if record["scale"] == scale]
    return sorted(found, key=lambda one: (one.record["experiment"], one.departures, one.record["ended"], one.record["id"]))


def _planned(scale: str, plan: Planner) -> dict[Run, tuple[str, bool]]:
    """{run: (where it belongs, whether only upstream)} of all tables and figures of a scale, those of plugins, too."""
    own = {f"{kind} {name}": specs.load(kind, name) for kind in specs.KINDS for name in specs.own(kind)}
    found: dict[Run, tuple[str, bool]] = {}
    for item, spec in {**specs.every(scale), **{name: spec for name, spec in own.items() if scale in spec["seeds"]}}.items():
        for cell in specs.cells(spec, scale):
            name = ", ".join(filter(None, (item, cell.row["label"], label_of(cell.column))))
            for words in cell.commands.values():
                found.setdefault(plan(words), (name, False))
        for line in [] if "series" in spec else spec.get("upstream", []):  # the runs that its caption quotes
            found.setdefault(plan([*line["overrides"], f"scale={scale}"]), (f"{item}, {line['label']}", False))
    for run, (name, _) in list(found.items()):
        for below in _below(run):
            found.setdefault(below, (f"upstream of {name}", True))
    return found


def _below(run: Run) -> Iterator[Run]:
    for below in run.upstream.values():
        yield from (below, *_below(below))


def _compared(record: Record, planned: list[tuple[str, str, Config]]) -> Unshown:
    """The record beside the planned run, (experiment, where it belongs, config), with the fewest differences."""
    here = _sorted(record["config"])
    found = [
        Unshown(record, name, provenance.departed([(here, there)], ignored=["scale"]))
        for experiment, name, there in planned
        if experiment == record["experiment"]
    ]
    return min(found, key=lambda one: len(one.differences), default=Unshown(record, "", {}))


def _sorted(config: Config) -> Config:
    """With sorted keys, as in records: a schedule is shown, and compared, as one text."""
    ordered: Config = json.loads(json.dumps(config, sort_keys=True))
    return ordered
