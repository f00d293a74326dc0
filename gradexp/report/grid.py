"""The numbers of a table or figure as claims name them: by row, column and metric."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from gradexp.base.errors import UserError, nearest
from gradexp.engine.record import metric_of
from gradexp.engine.run import Config, Run
from gradexp.report import specs
from gradexp.report.records import cells, label_of
from gradexp.report.specs import Planner
from gradexp.report.thesis import Thesis, read_thesis, thesis_of


class Cell(NamedTuple):
    """A cell that a claim names; a figure's column is a point or an x of its curves, "" where it has neither."""

    row: str
    column: str
    metric: str | None = None


class Grid:
    """A table, or a panel of a figure, whose rows are its series. Raises UserError if it does not exist."""

    def __init__(self, item: str, panel: str | None, scale: str, plan: Planner) -> None:
        kind, _, number = item.partition(" ")
        if kind not in ("table", "figure"):
            raise UserError(f"item {item!r}: expected `table NUMBER` or `figure NUMBER`")
        self.spec, self.scale = specs.load(kind, number), scale
        self.comparable: bool = scale in self.spec.get("comparable", [scale])  # with the thesis's numbers
        rows = [row for row in self.spec["rows" if kind == "table" else "series"] if row.get("panel") == panel]
        if not rows:
            raise UserError(f"panel {panel!r}: {item} has {', '.join(self.spec.get('panels', {})) or 'none'}")
        points = [x for row in rows for x in row.get("points", self.spec.get("points", []))]
        columns = self.spec["columns"] if kind == "table" else points
        self.rows, self.columns = {row["label"]: row for row in rows}, {label_of(column): column for column in columns}
        self._runs: dict[Any, dict[int, Run]] = {}  # by (row, column), then by seed
        if scale in self.spec["seeds"]:
            frame = cells(self.spec, scale, plan)
            in_panel = frame["panel"].isna() if panel is None else frame["panel"] == panel
            own = frame[in_panel & (frame["part"] == 0) & frame["run"].notna()]
            self._runs = {
                cell: dict(zip(runs["seed"], runs["run"], strict=True)) for cell, runs in own.groupby(["row", "column"])
            }

    def check(self, cell: Cell) -> None:
        """Raise UserError for a row or column that the table or figure does not have."""
        for what, name, known in (("row", cell.row, self.rows), ("column", cell.column, self.columns)):
            if known and name not in known:
                raise UserError(f"there is no {what} {name!r}{nearest(name, known)} It has {', '.join(known)}")

    def runs(self, cell: Cell) -> dict[int, Run]:
        """The cell's runs by seed, finished or not; empty if the scale does not have the cell."""
        return self._runs.get((cell.row, cell.column if self.columns else ""), {})

    def values(self, cell: Cell) -> pd.DataFrame:
        """`value` and `error` (standard error inside the run, NaN if not recorded) of the finished runs, indexed by seed."""
        metric, x = self.metric(cell), self.spec.get("x")
        records = {seed: record for seed, run in self.runs(cell).items() if (record := run.record())}
        numbers = [(value_at(record, metric, x, cell.column), error_of(record, metric)) for record in records.values()]
        return pd.DataFrame(numbers, index=list(records), columns=["value", "error"], dtype=float)

    def metric(self, cell: Cell) -> str:
        """The name of the recorded metric; `{fraction}` in it stands for a column in per cent."""
        metric = cell.metric or self._setting("metric", cell)
        if not isinstance(metric, str):
            raise UserError(f"metric is missing{': one of ' + ', '.join(metric) if metric else ''}")
        return metric.format(fraction=f"{float(cell.column) / 100:g}") if "{" in metric else metric

    def thesis(self, cell: Cell) -> float:
        """The number that the thesis prints in this cell; NaN if it prints none."""
        item: Any = self.spec.get("thesis", self.spec["number"])
        if isinstance(item, dict):
            return float(item.get(cell.metric or "", math.nan))
        if "series" in self.spec:
            return read_thesis().get((item, cell.row, cell.column), Thesis()).value
        quantity = self._setting("thesis_metric", cell)
        if isinstance(quantity, list):
            quantity = quantity[self._setting("metric", cell).index(self.metric(cell))]
        return thesis_of(self.spec, *self._entry(cell), quantity).value

    def _entry(self, cell: Cell) -> tuple[Config, Config]:
        return self.rows.get(cell.row, {}), self.columns.get(cell.column, {})

    def _setting(self, key: str, cell: Cell) -> Any:
        return specs.setting(key, *self._entry(cell), self.spec)


def value_at(record: Config, metric: str, x: str | None, column: str) -> float:
    """A recorded number, or the value of a curve where `x` is `column`. Raises UserError if the curve has no such x."""
    value: Any = metric_of(record, metric)
    if isinstance(value, list):
        grid = [f"{each:g}" for each in record["metrics"].get(x, [])]
        if column not in grid:
            raise UserError(f"record {record['id']}: the curve {metric} has no x {column!r}{nearest(column, grid)}")
        value = value[grid.index(column)]
    return math.nan if value is None else float(value)


def error_of(record: Config, metric: str) -> float:
    """Standard error inside a run: from its deviation over images or draws, or from its binomial interval (95 %)."""
    metrics = record["metrics"]
    spread, low, high = (metrics.get(f"{metric}/{name}") for name in ("std", "low", "high"))
    count = record.get("images") or record["config"].get("task", {}).get("draws")
    if spread is not None and count:
        return float(spread) / math.sqrt(count)
    return math.nan if low is None or high is None else float(high - low) / (2 * float(stats.norm.ppf(0.975)))
