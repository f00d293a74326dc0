"""The comparisons of a claim: cells of a table or figure, by row, column and metric, and which of two must be larger."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NotRequired

import pandas as pd
from scipy import stats
from typing_extensions import TypedDict

from gradexp.base.errors import UserError, nearest
from gradexp.base.typed import check, strict
from gradexp.engine.record import Moment, Record, metric_of
from gradexp.engine.run import Run
from gradexp.report import specs
from gradexp.report.specs import Planner, Thesis, read_thesis, thesis_of

Scale = Literal["paper", "cpu", "quick"]
RATES = re.compile("accuracy|gan_test")  # metrics of which more is better whatever a claim compares
FORMS: tuple[Literal["greater", "less", "near"], ...] = ("greater", "less", "near")
Except = TypedDict("Except", {"except": NotRequired[list[list[str]]]})  # a keyword, which a class can't have as a key


@strict
class Part(TypedDict):
    """Comparisons of a claim, each by its names or one of its cells, that are withheld, and why."""

    because: str
    cells: list[list[str]]


@strict
class ClaimSpec(Except):
    """The head of conf/claims.yaml describes the keys."""

    id: str
    section: str
    claim: str
    item: str
    scales: NotRequired[list[Scale]]
    across: NotRequired[Literal["rows", "columns"]]
    panel: NotRequired[str]
    metric: NotRequired[str]
    greater: NotRequired[list[Any]]  # of cells: names, numbers, CellSpecs, or lists of these
    less: NotRequired[list[Any]]
    near: NotRequired[list[Any]]
    within: NotRequired[float]
    by: NotRequired[float]
    at: NotRequired[list[str | float]]
    unit: NotRequired[Literal["seeds", "images"]]
    because: NotRequired[str]
    withheld: NotRequired[dict[Scale, str | Part]]
    written: NotRequired[Moment]
    fitted: NotRequired[dict[Scale, list[list[str]]]]


@strict
class CellSpec(TypedDict, total=False):
    """A cell as a claim names it; minus: another cell, the name of its row, or a number; label: its name on the page."""

    row: str
    column: str
    metric: str
    minus: Any
    label: str


class CellName(NamedTuple):
    """How a claim names a cell; a figure's column is a point or an x of its curves, "" where it has neither."""

    row: str
    column: str
    metric: str | None = None


class Grid:
    """A table, or a panel of a figure, whose rows are its series. Raises UserError if it does not exist."""

    def __init__(self, item: str, panel: str | None, scale: str, plan: Planner) -> None:
        kind, _, number = item.partition(" ")
        if kind not in specs.KINDS:
            raise UserError(f"item {item!r}: expected `table NUMBER` or `figure NUMBER`")
        self.spec, self.scale = specs.load(kind, number), scale
        self.comparable: bool = scale in self.spec.get("comparable", [scale])  # with the thesis's numbers
        rows = [row for row in specs.rows(self.spec) if row.get("panel") == panel]
        if not rows:
            known = self.spec.get("panels", {}) if "series" in self.spec else {}
            raise UserError(f"panel {panel!r}: {item} has {', '.join(known) or 'none'}")
        columns = [column for row in rows for column in specs.columns(self.spec, row) if column]
        self.rows = {row["label"]: row for row in rows}
        self.columns = {specs.label_of(column): column for column in columns}
        cells = [cell for cell in specs.cells(self.spec, scale) if cell.row in rows] if scale in self.spec["seeds"] else []
        self._runs = {
            (cell.row["label"], specs.label_of(cell.column)): {seed: plan(words) for seed, words in cell.commands.items()}
            for cell in cells
        }

    def check(self, cell: CellName) -> None:
        """Raise UserError for a row or column that the table or figure does not have."""
        for what, name, known in (("row", cell.row, self.rows), ("column", cell.column, self.columns)):
            if known and name not in known:
                raise UserError(f"there is no {what} {name!r}{nearest(name, known)} It has {', '.join(known)}")

    def runs(self, cell: CellName) -> dict[int, Run]:
        """The cell's runs by seed, finished or not; empty if the scale does not have the cell."""
        return self._runs.get((cell.row, cell.column if self.columns else ""), {})

    def values(self, cell: CellName) -> pd.DataFrame:
        """`value` and `error` (standard error inside the run, NaN if not recorded) of the finished runs, indexed by seed.

        A diverged run recognises nothing: its accuracy counts as less than any number. Other metrics of it are NaN.
        """
        metric, x = self.metric(cell), self.spec.get("x") if "series" in self.spec else None
        records = {seed: record for seed, run in self.runs(cell).items() if (record := run.record())}
        numbers = [[look(record, metric, x, cell.column) for look in (value_at, error_of)] for record in records.values()]
        found = pd.DataFrame(numbers, index=list(records), columns=["value", "error"], dtype=float)
        return found.fillna({"value": -math.inf}) if RATES.search(metric) else found

    def metric(self, cell: CellName) -> str:
        """The name of the recorded metric; `{fraction}` in it stands for a column in per cent."""
        metric = cell.metric or self._setting("metric", cell)
        if not isinstance(metric, str):
            raise UserError(f"metric is missing{': one of ' + ', '.join(metric) if metric else ''}")
        return metric.format(fraction=f"{float(cell.column) / 100:g}") if "{" in metric else metric

    def thesis(self, cell: CellName) -> float:
        """The number that the thesis prints in this cell; NaN if it prints none."""
        item: Any = self.spec.get("thesis", self.spec["number"])
        if isinstance(item, dict):  # of metrics, in the first series
            return float(item.get(cell.metric or "", math.nan)) if cell.row == next(iter(self.rows)) else math.nan
        if "series" in self.spec:
            return read_thesis().get((item, cell.row, cell.column), Thesis()).value
        quantity = self._setting("thesis_metric", cell)
        if isinstance(quantity, list):
            quantity = quantity[self._setting("metric", cell).index(self.metric(cell))]
        return thesis_of(self.spec, self.rows[cell.row], self.columns[cell.column], quantity).value

    def _setting(self, key: str, cell: CellName) -> Any:
        return specs.setting(key, self.rows.get(cell.row, {}), self.columns.get(cell.column, {}), self.spec)


def value_at(record: Record, metric: str, x: str | None, column: str) -> float:
    """A recorded number, the value of a curve where `x` is `column`, or the last value of a curve of training (`x` is None).

    Raises UserError if the curve has no such x.
    """
    value: Any = metric_of(record, metric)
    if isinstance(value, list) and x is None:
        value = value[-1]
    elif isinstance(value, list):
        points: Any = record["metrics"].get(x or "", [])
        grid = [f"{each:g}" for each in points]
        if column not in grid:
            raise UserError(f"record {record['id']}: the curve {metric} has no x {column!r}{nearest(column, grid)}")
        value = value[grid.index(column)]
    return math.nan if value is None else float(value)


def error_of(record: Record, metric: str, x: str | None, column: str) -> float:
    """Standard error inside a run: from its deviation over images or draws, or from its binomial interval."""
    deviation = f"{metric}_std" if f"{metric}_std" in record["metrics"] else f"{metric}/std"  # the first: of density_ratio
    spread, low, high = (
        value_at(record, name, x, column) if name in record["metrics"] else math.nan
        for name in (deviation, f"{metric}/low", f"{metric}/high")
    )
    task = record["config"].get("task", {})
    every = record.get("data", {}).get("test_images") if "images" in task else None  # images: null
    if not math.isnan(spread) and (count := record.get("images") or task.get("draws") or task.get("images") or every):
        return spread / math.sqrt(count)
    return (high - low) / (2 * float(stats.norm.ppf((1 + task.get("confidence", 0.95)) / 2)))


@dataclass(frozen=True)
class Sum:
    """Cells, each once with the number of times that it is added, and a constant."""

    name: str
    cells: tuple[tuple[int, CellName], ...] = ()
    constant: float = 0.0

    def __sub__(self, other: Sum) -> Sum:
        times: Counter[CellName] = Counter()
        for factor, (number, cell) in [*((1, one) for one in self.cells), *((-1, one) for one in other.cells)]:
            times[cell] += factor * number
        cells = tuple((number, cell) for cell, number in times.items() if number)
        return Sum(f"({self.name}) − ({other.name})", cells, self.constant - other.constant)


class Pair(NamedTuple):
    """One comparison: it holds if `gap` > 0."""

    label: str
    gap: Sum
    names: tuple[str, ...]  # both sides, and the row or column where they are compared
    excepted: bool  # the thesis's own numbers contradict it

    def matches(self, entry: tuple[str, ...]) -> bool:
        """Whether an entry of `fitted` or `withheld` names the comparison, [a, b, at], or one of its cells, [row, column]."""
        return self.names == entry or any((cell.row, cell.column) == entry for _, cell in self.gap.cells)


def pairs(spec: ClaimSpec, grid: Grid) -> list[Pair]:
    """The comparisons of a claim. Raises UserError for names that its table or figure does not have."""
    forms = [form for form in FORMS if form in spec]
    if len(forms) != 1:
        raise UserError(f"expected one of {', '.join(FORMS)}, got {' and '.join(forms) or 'none'}")
    levels = [level if isinstance(level, list) else [level] for level in spec[forms[0]]]
    excepted = {tuple(map(str, names)) for names in spec.get("except", [])}
    found = []
    for at, (upper, lower) in itertools.product(_positions(spec, levels, grid), itertools.pairwise(levels)):
        for a, b in itertools.product(upper, lower):
            left, right = _sum(a, at, spec, grid), _sum(b, at, spec, grid)
            names = (left.name, right.name, at)
            for label, gap in _gaps(forms[0], left, right, spec):
                found.append(Pair(label + (f", {at}" if at else ""), gap, names, names in excepted))
    if unknown := excepted - {pair.names for pair in found}:
        raise UserError(f"except: there is no comparison {unknown.pop()}")
    return found


def _positions(spec: ClaimSpec, levels: list[list[Any]], grid: Grid) -> list[str]:
    """The columns (`across: columns`: rows) at which cells are compared; [""] if every cell names its own."""
    if "at" in spec:
        return [str(at) for at in spec["at"]]
    known, key = (grid.rows, "row") if spec.get("across") == "columns" else (grid.columns, "column")
    nodes = itertools.chain(*levels)
    needed = any(isinstance(node, str) or (isinstance(node, dict) and key not in node) for node in nodes)
    return list(known) if needed and known else [""]


def _gaps(form: str, left: Sum, right: Sum, spec: ClaimSpec) -> Iterator[tuple[str, Sum]]:
    """Label and what must be positive: one comparison, two for `near`."""
    if form == "near":
        within = Sum(f"{spec['within']:g}", constant=-float(spec["within"]))
        yield f"{left.name} > {right.name} − {within.name}", left - right - within
        yield f"{left.name} < {right.name} + {within.name}", right - left - within
        return
    margin = float(spec.get("by", 0))
    extra = f" {'+' if (margin > 0) == (form == 'greater') else '−'} {abs(margin):g}" if margin else ""
    gap = left - right if form == "greater" else right - left
    yield f"{left.name} {'>' if form == 'greater' else '<'} {right.name}{extra}", gap - Sum("", constant=margin)


def _sum(node: Any, at: str, spec: ClaimSpec, grid: Grid) -> Sum:
    """A cell of the file: the name of a row (`across: columns`: of a column), a number, or a CellSpec."""
    if isinstance(node, int | float):
        return Sum(f"{node:g}", constant=float(node))
    own, other = ("column", "row") if spec.get("across") == "columns" else ("row", "column")
    if isinstance(node, str):
        node = {own: node}
    check(CellSpec, node, "cell")
    cell = CellName(
        **{own: str(node.get(own, "")), other: str(node.get(other, at))}, metric=node.get("metric", spec.get("metric"))
    )
    grid.check(cell)
    name = node.get("label") or " at ".join(str(node[key]) for key in ("row", "column", "metric") if key in node)
    found = Sum(name, ((1, cell),))
    return found - _sum(node["minus"], at, spec, grid) if "minus" in node else found
