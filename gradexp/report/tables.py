"""A thesis table from records.

A table is data: rows, columns and the runs behind each cell. Every cell knows its runs, so that a number can be followed to
its records, and an empty cell says how to fill itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from gradexp.engine.record import value_of
from gradexp.engine.run import Config, Run
from gradexp.report import provenance, records, specs
from gradexp.report.specs import Planner, command, seeds_of
from gradexp.report.thesis import item_of, read_thesis

CELL = ["row", "column"]
ABSENT = "n/a"  # in a cell that the scale does not run


@dataclass(frozen=True)
class Table:
    """cells: records.cells, one row for each seed and metric of a cell; numbers: summary, one row for each metric of a cell."""

    number: str
    title: str
    corner: str
    scale: str
    cells: pd.DataFrame
    numbers: pd.DataFrame
    caption: tuple[str, ...]
    best_per: str | None = "column"  # what has one best number each; None where none is marked
    departures: tuple[tuple[str, str, str], ...] = ()  # every (setting, here, at scale=paper)

    @property
    def rows(self) -> list[str]:
        return list(self.numbers["row"].unique())

    @property
    def columns(self) -> list[str]:
        return list(self.numbers["column"].unique())

    @property
    def runs(self) -> list[Run]:
        return list(self.cells["run"].dropna().unique())

    @property
    def missing(self) -> list[Run]:
        return [run for run in self.runs if not run.finished]


def summary(cells: pd.DataFrame, spec: Config, scale: str) -> pd.DataFrame:
    """Mean and deviation over the finished seeds of each cell.

    One row for each metric of each cell: row, column, part, metric; ours, std, n; planned (seeds, finished or not); thesis,
    thesis_std, thesis_bold; difference (ours - thesis, where they may be compared); best; inside (whether std is the
    deviation inside the runs, over draws or images, and not the one over seeds).
    """
    groups = cells.groupby([*CELL, "part"], sort=False)
    numbers = pd.DataFrame([_number(group) for _, group in groups])
    numbers["difference"] = numbers["ours"] - numbers["thesis"] if scale in spec["comparable"] else math.nan
    numbers["best"] = best(numbers, spec)
    return numbers


def _number(cell: pd.DataFrame) -> Config:
    """The mean over finished runs is NaN where one diverged, and so is the deviation (of the sample)."""
    first, done = cell.iloc[0], cell[cell["finished"]]
    inside = bool(done["spread"].notna().any())
    return {
        **first[[*CELL, "part", "metric", "thesis", "thesis_std", "thesis_bold"]],
        "ours": done["value"].mean(skipna=False),
        "std": math.sqrt((done["spread"] ** 2).mean()) if inside else done["value"].std(skipna=False),
        "n": len(done),
        "planned": int(cell["run"].notna().sum()),
        "inside": inside,
    }


def best(numbers: pd.DataFrame, spec: Config) -> pd.Series[bool]:
    """Bold as in the thesis: the best of each column, row, or of the table, where at least two of its cells are filled.

    The last metric of a cell decides. A row that is `apart`, such as an oracle, does not compete.
    """
    own = {column["label"]: column["best"] for column in spec["columns"] if "best" in column}
    last = numbers.drop_duplicates(CELL, keep="last")
    direction = last["column"].map(lambda column: own.get(column, spec["best"]))
    competing = last[last["ours"].notna() & ~last["row"].isin(_apart(spec)) & direction.notna()]
    per = spec.get("best_per", "column")
    group = competing[per] if per in CELL else pd.Series("", competing.index)
    won: list[tuple[str, str]] = []
    for (_, wanted), rivals in competing.groupby([group, direction.loc[competing.index]]):
        if len(rivals) > 1:
            winners = rivals[rivals["ours"] == rivals["ours"].agg(str(wanted))]
            won += zip(winners["row"], winners["column"], strict=True)
    return pd.Series([cell in won for cell in zip(numbers["row"], numbers["column"], strict=True)], numbers.index)


# --- from a spec to a table -------------------------------------------------------------------------------


def _paper_words(spec: Config, row: Config, column: Config, seed: int) -> list[str]:
    """What a cell's run is set against at scale=paper: itself, or its row's first run there where that has no such column."""
    there = next((one for one in [column, *spec["columns"]] if "paper" in one.get("scales", ["paper"])), column)
    return command(spec, row, there, "paper", seed)


def build(spec: Config, scale: str, plan: Planner) -> Table:
    """The table that `conf/table/NUMBER.yaml` describes, filled with whatever records there are."""
    cells = records.cells(spec, scale, plan)
    numbers = summary(cells, spec, scale)
    runs = list(cells["run"].dropna().unique())
    pairs: list[tuple[Config, Config]] = []  # of each cell, here and at scale=paper
    for row, column, seeds in specs.cells(spec, scale):
        for seed, words in list(seeds.items())[:1]:
            pairs.append((plan(words).config, plan(_paper_words(spec, row, column, seed)).config))
    lines = [line for line in spec.get("upstream", []) if scale in line.get("scales", spec["seeds"])]
    upstream = [(line, plan([*line["overrides"], f"scale={scale}"])) for line in lines]
    departed = provenance.departed(pairs)
    data = sorted({config["data"]["name"] for config, _ in pairs})
    return Table(
        number=spec["number"],
        title=spec["title"].format(data=", ".join(data), where=spec.get("where", {}).get(scale)),
        corner=spec["corner"],
        scale=scale,
        cells=cells,
        numbers=numbers,
        caption=(
            *_what_it_is(spec, scale, missing=not all(run.finished for run in runs)),
            provenance.departure_sentence(scale, departed, tuple(spec.get("told", ()))),
            *(_upstream_sentence(line, run, spec, scale) for line, run in upstream),
            *_how_to_read_it(
                spec,
                scale,
                printed=bool(numbers["thesis"].notna().any()),
                held_out=any(config.get("data", {}).get("validation") for config, _ in pairs),
            ),
            provenance.origins(*provenance.read(runs)),
        ),
        best_per=spec.get("best_per", "column") if spec["best"] else None,
        departures=tuple((key, *values) for key, values in departed.items()),
    )


def _apart(spec: Config) -> list[str]:
    """The rows that are not compared with the others."""
    return [row["label"] for row in spec["rows"] if row.get("apart")]


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
    record = run.record()
    mine = f"{value_of(record, line.get('metric', 'test/accuracy')):.2f} (run {run.id})" if record else "not run yet"
    printed = read_thesis().get((item_of(spec), *line["thesis"])) if scale in spec["comparable"] else None
    return f"{line['label'].capitalize()}: {mine}" + (f"; the thesis's {printed.value:g}." if printed else ".")
