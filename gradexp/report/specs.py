"""Tables and figures as data (conf/table/*.yaml, conf/figure/*.yaml), and the thesis's own numbers (results/thesis.csv)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, final, overload

import pandas as pd
from annotated_types import MinLen
from typing_extensions import TypedDict

from gradexp.base.errors import UserError, nearest
from gradexp.base.texts import read_yaml
from gradexp.base.typed import check, strict
from gradexp.engine.compose import conf_folders
from gradexp.engine.plugins import own_conf_folders
from gradexp.engine.run import ROOT, Run

Planner = Callable[[Sequence[str]], Run]
Best = Literal["max", "min"] | None
Names = str | list[str]
THESIS_COLUMNS = ["item", "row", "column", "metric", "value", "std", "bold"]


class Entry(TypedDict):
    """A row, column, series or point."""

    overrides: NotRequired[list[str]]
    scales: NotRequired[list[str]]  # that have it, if not all


class Shown(TypedDict):
    """Settings of cells, in a row, a column or the table; the first of these that has a key takes precedence."""

    experiment: NotRequired[str]
    metric: NotRequired[Names]  # of the record; the last of several decides which cell is best
    spread: NotRequired[str]  # a recorded deviation over images or draws
    thesis_metric: NotRequired[Names]  # its name in results/thesis.csv, if the cell has several there


class Item(TypedDict):
    """A table or figure. `like: NUMBER` in its file stands for the keys of another, which the file's own keys replace."""

    number: str
    title: str
    seeds: dict[str, list[int]]  # by scale
    note: NotRequired[str]
    notes: NotRequired[dict[str, str]]  # by scale
    needs: NotRequired[dict[str, str]]  # what its missing runs need, by scale


@strict
class RowSpec(Entry, Shown):
    label: str
    thesis: NotRequired[str | None]  # the label in results/thesis.csv, if it differs
    apart: NotRequired[bool]  # not compared with the others, such as an oracle


@final
@strict
class ColumnSpec(Entry, Shown):
    label: str
    thesis: NotRequired[str | None]
    seeds: NotRequired[dict[str, list[int]]]
    best: NotRequired[Best]


@strict
class UpstreamSpec(TypedDict):
    """A run whose number the caption quotes, such as the teacher's."""

    label: str
    thesis: list[str]
    overrides: list[str]
    scales: NotRequired[list[str]]
    metric: NotRequired[str]


@final
@strict
class TableSpec(Item, Shown):
    comparable: list[str]  # scales whose numbers can be compared with the thesis's
    corner: str
    best: Best
    best_per: NotRequired[Literal["row", "column", "table"]]
    overrides: NotRequired[list[str]]  # of all cells, before those of rows and columns
    rows: Annotated[list[RowSpec], MinLen(1)]
    columns: Annotated[list[ColumnSpec], MinLen(1)]
    thesis: NotRequired[str]  # the item in results/thesis.csv, if it is not the number
    where: NotRequired[dict[str, str]]
    described: NotRequired[list[str]]  # starts of settings whose departures the notes describe
    only: NotRequired[dict[str, list[list[str]]]]  # the cells, [row, column], that a scale runs, if not all
    upstream: NotRequired[list[UpstreamSpec]]


@final
@strict
class PointSpec(Entry):
    x: float


@final
class NoPoint(Entry):
    """Stands for the only point of a series that has none."""


@strict
class SeriesSpec(Entry):
    label: str
    experiment: NotRequired[str]
    points: NotRequired[list[PointSpec]]
    panel: NotRequired[str]
    overlay: NotRequired[bool]


@strict
class CurveSpec(TypedDict):
    metric: str
    ylabel: str
    yscale: NotRequired[str]


@strict
class LineSpec(TypedDict):
    y: float
    label: str


@final
@strict
class FigureSpec(Item):
    """The drawing function in gradexp/report/draw/ documents the keys after `also`."""

    draw: str
    experiment: NotRequired[str]
    series: list[SeriesSpec]
    points: NotRequired[list[PointSpec]]
    overrides_at: NotRequired[dict[str, list[str]]]  # by scale
    comparable: NotRequired[list[str]]
    thesis: NotRequired[str | dict[str, float]]
    also: NotRequired[list[str]]  # further formats
    partial: NotRequired[bool]  # whether it is drawn without series whose runs are missing, once the first has all of them
    metric: NotRequired[str]
    metrics: NotRequired[list[str]]
    x: NotRequired[str]
    xlabel: NotRequired[str]
    xscale: NotRequired[str]
    ylabel: NotRequired[str]
    curves: NotRequired[list[CurveSpec]]
    panels: NotRequired[dict[str, str]]
    lines: NotRequired[list[LineSpec]]
    array: NotRequired[str]
    above: NotRequired[dict[str, str]]
    beside: NotRequired[dict[str, str]]
    signed: NotRequired[bool]
    reading: NotRequired[str]
    first: NotRequired[int]
    rows: NotRequired[int]
    columns: NotRequired[int | list[dict[str, str]]]


@strict
class ReportSettings(TypedDict):
    """The comments of conf/report.yaml describe the keys."""

    title: str
    subtitle: str
    close: float
    curve_points: int
    headlines: list[dict[str, str]]
    scales: dict[str, str]
    chapters: list[dict[str, Any]]
    bench: dict[str, str]
    verdicts: dict[Literal["words", "tests"], list[str]]


Spec = TableSpec | FigureSpec
RowOrSeries = RowSpec | SeriesSpec
ColumnOrPoint = ColumnSpec | PointSpec | NoPoint
KINDS: dict[str, Any] = {"table": TableSpec, "figure": FigureSpec}


def settings() -> ReportSettings:
    """conf/report.yaml. Raises UserError where it is damaged or lacks a key."""
    return check(ReportSettings, read_yaml(ROOT / "conf" / "report.yaml"), "conf/report.yaml")


def numbers(kind: str) -> list[str]:
    """The numbers of the thesis's tables or figures; kind: `table` or `figure`."""
    return sorted(file.stem for file in (ROOT / "conf" / kind).glob("*.yaml"))


def own(kind: str) -> dict[str, Path]:
    """{name: file} of the tables or figures in packages that GRADEXP_PLUGINS names, which are rendered to results/own."""
    return {file.stem: file for folder in own_conf_folders() for file in sorted((folder / kind).glob("*.yaml"))}


def folder_of(kind: str, number: str, results: Path) -> Path:
    """Where a table or figure is rendered to: `results`, or its subfolder `own`."""
    return results / "own" if number in own(kind) else results


def parts(kind: str, number: str) -> list[str]:
    """[number] if it exists, otherwise its parts, such as `3.2a` and `3.2b` for `3.2`; [number] if there are none."""
    known = [*numbers(kind), *own(kind)]
    return [number] if number in known else [name for name in known if name[:-1] == number] or [number]


def load(kind: str, number: str) -> Spec:
    """The spec of a table or figure. Raises UserError if it does not exist or is not a valid TableSpec or FigureSpec."""
    files = {name: ROOT / "conf" / kind / f"{name}.yaml" for name in numbers(kind)} | own(kind)
    spec: Spec = check(KINDS[kind], {"number": number, **_content(kind, number, files)}, f"{kind} {number}")
    _check_labels(spec, f"{kind} {number}")
    _check_scales(spec, f"{kind} {number}")
    _check_thesis(spec, f"{kind} {number}")
    return spec


def _content(kind: str, number: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """The keys of a file, after those of the table or figure that its `like` names, which they replace."""
    if number not in files:
        raise UserError(f"no {kind} {number}{nearest(number, files)} conf/{kind}/ has {', '.join(files) or 'none'}")
    content = read_yaml(files[number]) or {}
    if not isinstance(content, dict):
        raise UserError(f"{files[number]} is not a mapping of keys to values")
    if "like" not in content:
        return content
    others = {name: file for name, file in files.items() if name != number}  # two that are like each other would never end
    return _content(kind, str(content.pop("like")), others) | content


def _check_scales(spec: Spec, where: str) -> None:
    """Raises UserError for a scale that does not exist, and for overrides of scale and seed, which the spec itself sets."""
    known = sorted({file.stem for folder in conf_folders() for file in (folder / "scale").glob("[!_]*.yaml")})
    above: list[Any] = [] if "series" in spec else [*spec.get("upstream", [])]
    entries: list[Any] = [spec, *rows(spec), *(column for row in rows(spec) for column in columns(spec, row))]
    for entry in above + entries:
        for key in ("seeds", "scales", "comparable", "only", "notes", "needs", "overrides_at"):
            for scale in entry.get(key) or []:
                if scale not in known:
                    raise UserError(
                        f"{where}: {key} has {scale}, which is no scale{nearest(scale, known)} Available: {', '.join(known)}"
                    )
        for word in chain(entry.get("overrides", []), *entry.get("overrides_at", {}).values()):
            if word.startswith("scale=") or (word.startswith("seed=") and entry not in above):
                raise UserError(f"{where}: {word} is no override of a row, column or series; set `scales` or `seeds`")


def _check_labels(spec: Spec, where: str) -> None:
    """Raises UserError for two rows, columns or series of one label, whose cells would be taken for one another's."""
    entries: Mapping[str, Sequence[RowOrSeries | ColumnSpec]] = (
        {"series": spec["series"]} if "series" in spec else {"rows": spec["rows"], "columns": spec["columns"]}
    )
    for name, listed in entries.items():
        for scale in spec["seeds"]:
            shown = Counter((entry["label"], entry.get("panel")) for entry in listed if scale in entry.get("scales", [scale]))
            if twice := [label for (label, _), count in shown.items() if count > 1]:
                raise UserError(f"{where}: two {name} have the label {twice[0]!r}; give each its own")


def _check_thesis(spec: Spec, where: str) -> None:
    """Raises UserError for a name that the thesis has no number under: a misspelt one would leave a cell without its number."""
    if "thesis" not in spec and all(key[0] != item_of(spec) for key in read_thesis()):
        return  # a table of one's own, which names no table of the thesis
    listed: list[tuple[str, int, Any]] = [("row", 1, row) for row in rows(spec)]
    listed += [("column", 2, column) for row in rows(spec) for column in columns(spec, row)]
    for what, place, entry in listed:
        if (name := entry.get("thesis")) is not None:
            known = {key[place] for key in read_thesis() if key[0] == item_of(spec)}
            if str(name) not in known:
                said = f"results/thesis.csv has no such {what} of {item_of(spec)}{nearest(str(name), known)}"
                raise UserError(f"{where}: thesis: {name}: {said}")


@overload
def at_scale(kind: Literal["table"], scale: str) -> dict[str, TableSpec]: ...
@overload
def at_scale(kind: Literal["figure"], scale: str) -> dict[str, FigureSpec]: ...
@overload
def at_scale(kind: str, scale: str) -> Mapping[str, Spec]: ...
def at_scale(kind: str, scale: str) -> Mapping[str, Spec]:
    """{number: spec} of the tables or figures that a scale has."""
    every = {number: load(kind, number) for number in numbers(kind)}
    return {number: spec for number, spec in every.items() if scale in spec["seeds"]}


def every(scale: str) -> dict[str, Spec]:
    """{`table N` or `figure N`: spec} of all that a scale has."""
    return {f"{kind} {number}": spec for kind in KINDS for number, spec in at_scale(kind, scale).items()}


def seeds_of(spec: Item, scale: str) -> list[int]:
    """The seeds at a scale. Raises UserError if the spec does not have the scale."""
    if scale not in spec["seeds"]:
        raise UserError(f"scale={scale}: {spec['number']} has {', '.join(spec['seeds'])}")
    return list(spec["seeds"][scale])


def setting(key: str, *entries: Mapping[str, object]) -> Any:
    """The value of the first entry that has this key, otherwise None."""
    return next((entry[key] for entry in entries if key in entry), None)


def notes(spec: Item, scale: str) -> list[str]:
    """The notes of a table or figure: the general one and that of the scale."""
    return [text for text in (spec.get("note"), spec.get("notes", {}).get(scale)) if text]


# --- cells ------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A cell of a table (row and column) or figure (series and one of its points).

    commands: the overrides of `python run.py` by seed; empty for a cell that the scale does not run.
    """

    row: RowOrSeries
    column: ColumnOrPoint
    commands: dict[int, list[str]]


def rows(spec: Spec) -> list[RowOrSeries]:
    """The rows of a table, or the series of a figure."""
    return list(spec["series"] if "series" in spec else spec["rows"])


def columns(spec: Spec, row: RowOrSeries) -> list[ColumnOrPoint]:
    """The columns of a table, or the points of a figure's series; one that is empty for a series without points."""
    listed: Any = row.get("points", spec.get("points", [NoPoint()])) if "series" in spec else spec["columns"]
    return list(listed)


def label_of(column: ColumnOrPoint) -> str:
    """The label of a table's column, or the x of a figure's point."""
    return str(column["label"]) if "label" in column else f"{column['x']:g}" if "x" in column else ""


def cells(spec: Spec, scale: str) -> Iterator[Cell]:
    """All cells of a table or figure, row by row; at a scale listed in a table's `only`, the other cells have no commands."""
    common, only = seeds_of(spec, scale), None if "series" in spec else spec.get("only", {}).get(scale)
    for row in rows(spec):
        for column in columns(spec, row):
            if not all(scale in entry.get("scales", [scale]) for entry in (row, column)):
                continue
            wanted = only is None or [row["label"], label_of(column)] in only
            seeds = column["seeds"].get(scale, common) if "seeds" in column else common
            yield Cell(row, column, {seed: command(spec, row, column, scale, seed) for seed in seeds if wanted})


def commands(spec: Spec, scale: str) -> list[list[str]]:
    """The overrides of every run of a table or figure."""
    return [overrides for cell in cells(spec, scale) for overrides in cell.commands.values()]


def command(spec: Spec, row: RowOrSeries, column: ColumnOrPoint, scale: str, seed: int) -> list[str]:
    """The overrides of one cell and seed. A row, a series or a column may name an experiment of its own."""
    first = [f"experiment={setting('experiment', row, column, spec)}", f"scale={scale}"]
    common = spec.get("overrides_at", {}).get(scale, []) if "series" in spec else spec.get("overrides", [])
    own = [*common, *row.get("overrides", []), *column.get("overrides", [])]
    return [*first, *own, f"seed={seed}"]


# --- the thesis's numbers ---------------------------------------------------------------------------------


class Thesis(NamedTuple):
    """A number that the thesis prints, and its standard deviation; NaN if it prints none."""

    value: float = math.nan
    bold: bool = False
    std: float = math.nan


@cache
def read_thesis() -> dict[tuple[str, ...], Thesis]:
    """The numbers by (item, row, column), and by (item, row, column, quantity) for cells with several.

    Raises UserError where the file is damaged, empty, or has two numbers for one cell.
    """
    file = ROOT / "results" / "thesis.csv"
    numbers: dict[tuple[str, ...], Thesis] = {}
    try:
        lines: Any = pd.read_csv(file, dtype=str, keep_default_na=False)[THESIS_COLUMNS].itertuples()
        for line in lines:
            key, bold = (line.item, line.row, line.column), line.bold == "1"
            if (*key, line.metric) in numbers:
                raise ValueError(f"{', '.join(key)} has two numbers")
            numbers[key] = numbers[*key, line.metric] = Thesis(float(line.value), bold, float(line.std or math.nan))
        if not numbers:
            raise ValueError("it has no numbers")
    except (OSError, ValueError, KeyError) as error:  # pandas's own errors are ValueErrors
        raise UserError(f"{file} can't be read ({' '.join(str(error).split())}); restore it with git") from None
    return numbers


def item_of(spec: Spec) -> str:
    """The name of a table in results/thesis.csv."""
    return str(spec.get("thesis", spec["number"]))


def thesis_of(spec: Spec, row: RowOrSeries, column: ColumnOrPoint, quantity: str | None) -> Thesis:
    """The number that the thesis prints in a table's cell; quantity: which one, if the cell has several."""
    names = [str(row.get("thesis", row["label"])), str(column.get("thesis", label_of(column)))]
    return read_thesis().get((item_of(spec), *names, *([quantity] if quantity else [])), Thesis())
