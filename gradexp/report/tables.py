"""A thesis table from records.

A table is data: rows, columns and the run behind each cell. Every cell knows its runs, so that a number can be
followed to its records, and an empty cell says how to fill itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

from gradexp.engine.record import value_of
from gradexp.engine.run import Config, Run
from gradexp.report import provenance, specs
from gradexp.report.specs import Planner, command, seeds_of, setting
from gradexp.report.thesis import Thesis, item_of, read_thesis, thesis_of

EMPTY = "–"  # in the place of a number that is missing
ABSENT = "n/a"  # of a cell that the scale does not run


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    runs: tuple[Run, ...]
    thesis: Thesis | None
    comparable: bool
    metric: str
    values: tuple[float, ...]  # of the finished runs, in the order of the seeds; NaN where one diverged
    spreads: tuple[float, ...] = ()  # standard deviations inside each run (over draws or images), where the table shows these
    best: bool = False
    others: tuple[Cell, ...] = ()  # further metrics of the same runs, shown in the same place: accuracy / GAN-test

    @property
    def parts(self) -> tuple[Cell, ...]:
        """The cell's metrics; the last one decides which cell is best."""
        return (self, *self.others)

    @property
    def ours(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation inside the runs where the table shows that; otherwise over seeds, of the sample."""
        if self.spreads:
            return math.sqrt(statistics.fmean(spread**2 for spread in self.spreads))
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan  # some run diverged

    @property
    def difference(self) -> float | None:
        if self.ours is None or self.thesis is None or not self.comparable:
            return None
        difference = self.ours - self.thesis.value
        return difference if math.isfinite(difference) else None

    @property
    def missing(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]


@dataclass(frozen=True)
class Table:
    number: str
    title: str
    corner: str
    scale: str
    caption: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    best_per: str | None = "column"  # what has one best number each; None where none is marked
    departures: tuple[tuple[str, str, str], ...] = ()  # every (setting, here, at scale=paper)

    def cell(self, row: str, column: str) -> Cell:
        return next(cell for cell in self.cells if (cell.row, cell.column) == (row, column))

    @property
    def missing(self) -> list[Run]:
        return list(dict.fromkeys(run for cell in self.cells for run in cell.missing))


def values_of(runs: Iterable[Run], metric: str) -> tuple[float, ...]:
    return tuple(value_of(record, metric) for run in runs if (record := run.record()))


def mark_best(
    cells: Sequence[Cell],
    best: str | None,
    per: str = "column",
    apart: Sequence[str] = (),
    columns: Mapping[str, str | None] = MappingProxyType({}),
) -> tuple[Cell, ...]:
    """Bold as in the thesis: the best of each column (`row`, or whole `table`), where at least two of its cells are filled.

    best: `max`, `min`, or None for a table without bold numbers; columns: what `best` is of columns with one of their own.
    apart: rows that do not compete, such as an oracle.
    """
    groups: dict[tuple[str, str | None], list[float]] = {}
    for cell in cells:
        value = cell.parts[-1].ours
        if value is not None and value == value and cell.row not in apart:
            groups.setdefault((getattr(cell, per, ""), columns.get(cell.column, best)), []).append(value)
    pick = {"max": max, "min": min}
    winners = {group: pick[group[1]](numbers) for group, numbers in groups.items() if len(numbers) > 1 and group[1]}

    def wins(cell: Cell) -> bool:
        value, group = cell.parts[-1].ours, (getattr(cell, per, ""), columns.get(cell.column, best))
        return value is not None and cell.row not in apart and value == winners.get(group)

    return tuple(replace(cell, best=wins(cell)) for cell in cells)


# --- from a spec to a table -------------------------------------------------------------------------------


def _paper_words(spec: Config, row: Config, column: Config, seed: int) -> list[str]:
    """What a cell's run is set against at scale=paper: itself, or its row's first run there where that has no such column."""
    there = next((one for one in [column, *spec["columns"]] if "paper" in one.get("scales", ["paper"])), column)
    return command(spec, row, there, "paper", seed)


def build(spec: Config, scale: str, plan: Planner) -> Table:
    """The table that `conf/table/NUMBER.yaml` describes, filled with whatever records there are."""
    cells = []
    pairs: list[tuple[Config, Config]] = []  # of each cell, here and at scale=paper
    for row, column, seeds in specs.cells(spec, scale):
        cells.append(_cell(spec, row, column, tuple(map(plan, seeds.values())), scale))
        for seed, words in list(seeds.items())[:1]:
            pairs.append((plan(words).config, plan(_paper_words(spec, row, column, seed)).config))
    lines = [line for line in spec.get("upstream", []) if scale in line.get("scales", spec["seeds"])]
    upstream = [(line, plan([*line["overrides"], f"scale={scale}"])) for line in lines]
    departed = provenance.departed(pairs)
    data = sorted({config["data"]["name"] for config, _ in pairs})
    own_best = {column["label"]: column["best"] for column in spec["columns"] if "best" in column}
    return Table(
        number=spec["number"],
        title=spec["title"].format(data=", ".join(data), where=spec.get("where", {}).get(scale)),
        corner=spec["corner"],
        scale=scale,
        caption=(
            *_what_it_is(spec, scale, missing=any(cell.missing for cell in cells)),
            provenance.departure_sentence(scale, departed, tuple(spec.get("told", ()))),
            *(_upstream_sentence(line, run, spec, scale) for line, run in upstream),
            *_how_to_read_it(
                spec,
                scale,
                printed=any(part.thesis for cell in cells for part in cell.parts),
                held_out=any(config.get("data", {}).get("validation") for config, _ in pairs),
            ),
            provenance.origins(*provenance.read(run.record_path for cell in cells for run in cell.runs if run.finished)),
        ),
        rows=tuple(row["label"] for row in spec["rows"]),
        columns=tuple(dict.fromkeys(cell.column for cell in cells)),
        cells=mark_best(cells, spec["best"], spec.get("best_per", "column"), _apart(spec), own_best),
        best_per=spec.get("best_per", "column") if spec["best"] else None,
        departures=tuple((key, *values) for key, values in departed.items()),
    )


def _cell(spec: Config, row: Config, column: Config, runs: tuple[Run, ...], scale: str) -> Cell:
    """A cell with what its finished runs measured, and with the thesis's numbers."""
    metric, spread, quantity = (setting(key, row, column, spec) for key in ("metric", "spread", "thesis_metric"))
    spreads = values_of(runs, spread) if spread else ()
    parts = [
        Cell(
            row=row["label"],
            column=column["label"],
            runs=runs,
            thesis=thesis_of(spec, row, column, quantity),
            comparable=scale in spec["comparable"],
            metric=metric,
            values=values_of(runs, metric),
            spreads=spreads,
        )
        for metric, quantity in zip_longest(_listed(metric), _listed(quantity))
    ]
    return replace(parts[0], others=tuple(parts[1:]))


def _apart(spec: Config) -> list[str]:
    """The rows that are not compared with the others."""
    return [row["label"] for row in spec["rows"] if row.get("apart")]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# Sentences of the caption.


def _what_it_is(spec: Config, scale: str, missing: bool) -> Iterator[str]:
    yield from (text for text in (spec.get("note"), spec.get("notes", {}).get(scale)) if text)
    if scale in spec.get("only", {}):
        yield f"Cells marked {ABSENT} are not part of this scale."
    if missing and scale in spec.get("needs", {}):
        yield f"Its empty cells need {spec['needs'][scale]}."


def _how_to_read_it(spec: Config, scale: str, *, printed: bool, held_out: bool) -> Iterator[str]:
    if printed and scale not in spec["comparable"]:
        yield "The thesis's numbers mark their places; at this scale they can't be compared."
    for row in _apart(spec):
        yield f"The best number is marked among the rows without {row}."
    own = [column for column in spec["columns"] if scale in column.get("seeds", {})]
    listed = [f"column {column['label']}: {provenance.enumerated(column['seeds'][scale])}" for column in own]
    exceptions = f" ({'; '.join(listed)})" if listed else ""
    read = "Training images that are held out take the test set's place" if held_out else "The test set is read once"
    yield f"Seeds: {provenance.enumerated(seeds_of(spec, scale))}{exceptions}. {read}, after the last step."


def _upstream_sentence(line: Config, run: Run, spec: Config, scale: str) -> str:
    found = values_of([run], line.get("metric", "test/accuracy"))
    mine = f"{found[0]:.2f} (run {run.id})" if found else "not run yet"
    printed = read_thesis().get((item_of(spec), *line["thesis"])) if scale in spec["comparable"] else None
    return f"{line['label'].capitalize()}: {mine}" + (f"; the thesis's {printed.value:g}." if printed else ".")
