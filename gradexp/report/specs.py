"""Tables and figures as data: conf/table/*.yaml and conf/figure/*.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, cast

import yaml
from typing_extensions import TypedDict

from gradexp.base.errors import UserError, nearest
from gradexp.base.typed import check, strict
from gradexp.engine.run import ROOT, Config, Run

Planner = Callable[[Sequence[str]], Run]
Best = Literal["max", "min"] | None
Names = str | list[str]


@strict
class Shown(TypedDict):
    """What a row, a column or the table itself may say of its cells: the first of these three that has a key decides."""

    experiment: NotRequired[str]
    metric: NotRequired[Names]  # of the record; of several, the last one decides which cell is best
    spread: NotRequired[str]  # a deviation that the record has, over images or draws
    thesis_metric: NotRequired[Names]  # what results/thesis.csv calls the metric, where it has several


@strict
class RowSpec(Shown):
    label: str
    thesis: NotRequired[str | None]  # the label in results/thesis.csv, where it is another one
    overrides: NotRequired[list[str]]
    apart: NotRequired[bool]  # is not compared with the others, such as an oracle
    scales: NotRequired[list[str]]  # that have this row, where not all do


@strict
class ColumnSpec(Shown):
    label: str
    thesis: NotRequired[str | None]
    overrides: NotRequired[list[str]]
    scales: NotRequired[list[str]]
    seeds: NotRequired[dict[str, list[int]]]
    best: NotRequired[Best]


@strict
class UpstreamSpec(TypedDict):
    """A run that the caption gives a number of, such as the teacher."""

    label: str
    thesis: list[str]
    overrides: list[str]
    scales: NotRequired[list[str]]
    metric: NotRequired[str]


@strict
class TableSpec(Shown):
    number: str
    title: str
    seeds: dict[str, list[int]]  # by scale
    comparable: list[str]  # scales whose numbers may be set against the thesis's
    corner: str
    best: Best
    best_per: NotRequired[Literal["row", "column", "table"]]
    rows: list[RowSpec]
    columns: list[ColumnSpec]
    thesis: NotRequired[str]  # the item in results/thesis.csv, where it is not the number
    where: NotRequired[dict[str, str]]
    note: NotRequired[str]
    notes: NotRequired[dict[str, str]]
    told: NotRequired[list[str]]  # starts of settings whose departures the notes describe
    needs: NotRequired[dict[str, str]]
    only: NotRequired[dict[str, list[list[str]]]]  # the cells that a scale runs, where it does not run all
    upstream: NotRequired[list[UpstreamSpec]]


@strict
class PointSpec(TypedDict):
    x: float
    overrides: NotRequired[list[str]]
    scales: NotRequired[list[str]]


@strict
class SeriesSpec(TypedDict):
    label: str
    experiment: NotRequired[str]
    overrides: NotRequired[list[str]]
    points: NotRequired[list[PointSpec]]
    panel: NotRequired[str]
    overlay: NotRequired[bool]
    scales: NotRequired[list[str]]


@strict
class CurveSpec(TypedDict):
    metric: str
    ylabel: str
    yscale: NotRequired[str]


@strict
class LineSpec(TypedDict):
    y: float
    label: str


@strict
class FigureSpec(TypedDict):
    """Further keys are those of its drawing function in gradexp/report/draw/, which says what they mean."""

    number: str
    title: str
    draw: str
    experiment: NotRequired[str]
    seeds: dict[str, list[int]]
    series: list[SeriesSpec]
    points: NotRequired[list[PointSpec]]
    overrides_at: NotRequired[dict[str, list[str]]]  # for one scale each
    note: NotRequired[str]
    notes: NotRequired[dict[str, str]]
    needs: NotRequired[dict[str, str]]
    comparable: NotRequired[list[str]]
    thesis: NotRequired[str | dict[str, float]]
    also: NotRequired[list[str]]  # further formats
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


KINDS: dict[str, Any] = {"table": TableSpec, "figure": FigureSpec}


def numbers(kind: str) -> list[str]:
    """The tables or figures that there are; kind: `table` or `figure`."""
    return sorted(file.stem for file in (ROOT / "conf" / kind).glob("*.yaml"))


def parts(kind: str, number: str) -> list[str]:
    """`3.2` when there is one, otherwise its parts `3.2a`, `3.2b`; [number] where there is neither."""
    there = numbers(kind)
    return [number] if number in there else [name for name in there if name[:-1] == number] or [number]


def load(kind: str, number: str) -> Config:
    """The spec of a table or figure. Raises UserError when there is none, or it is not what TableSpec or FigureSpec says."""
    there = numbers(kind)
    if number not in there:
        raise UserError(f"no {kind} {number}{nearest(number, there)} conf/{kind}/ has {', '.join(there) or 'none'}")
    file = ROOT / "conf" / kind / f"{number}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"conf/{kind}/{number}.yaml is not YAML: {' '.join(str(error).split())}") from None
    return check(KINDS[kind], {"number": number, **content}, f"{kind} {number}")


def at_scale(kind: str, scale: str) -> dict[str, Config]:
    """{number: spec} of the tables or figures that a scale has."""
    found = {number: load(kind, number) for number in numbers(kind)}
    return {number: spec for number, spec in found.items() if scale in spec["seeds"]}


def seeds_of(spec: Config, scale: str) -> list[int]:
    """The seeds at a scale. Raises UserError for a scale that the spec does not have."""
    if scale not in spec["seeds"]:
        raise UserError(f"scale={scale}: {spec['number']} has {', '.join(spec['seeds'])}")
    return list(spec["seeds"][scale])


def setting(key: str, *places: Config) -> Any:
    """What the first place that has this key says; None where none has it."""
    return next((place[key] for place in places if key in place), None)


# --- cells ------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Where numbers of a table or figure come from: a row and a column, or a series and one of its points.

    commands: what to type for each seed, after `python run.py`; none for a cell that the scale does not run.
    """

    row: Config
    column: Config
    commands: dict[int, list[str]]


def cells(spec: Config, scale: str) -> Iterator[Cell]:
    """All cells of a table or figure, row by row.

    A scale listed under a table's `only` runs nothing but the cells that it names there. A series without points has one
    cell, whose column is empty.
    """
    common, only, columns = seeds_of(spec, scale), spec.get("only", {}).get(scale), spec.get("columns")
    for row in spec["series"] if "series" in spec else spec["rows"]:
        if "series" in spec:
            columns = row.get("points", spec.get("points", [{}]))
        for column in cast("list[Config]", columns):
            if not all(scale in place.get("scales", [scale]) for place in (row, column)):
                continue
            wanted = only is None or [row["label"], column["label"]] in only
            seeds = column.get("seeds", {}).get(scale, common) if wanted else []
            yield Cell(row, column, {seed: command(spec, row, column, scale, seed) for seed in seeds})


def command(spec: Config, row: Config, column: Config, scale: str, seed: int) -> list[str]:
    """What to type for one cell and one seed. A row, a series or a column may name an experiment of its own."""
    first = [f"experiment={setting('experiment', row, column, spec)}", f"scale={scale}"]
    own = [*spec.get("overrides_at", {}).get(scale, []), *row.get("overrides", []), *column.get("overrides", [])]
    return [*first, *own, f"seed={seed}"]
