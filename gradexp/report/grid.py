"""The cells of a table or figure as claims name them: by row and column, at a metric."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scipy import stats

from gradexp.base.errors import UserError, nearest
from gradexp.engine.run import Config, Run
from gradexp.report import specs
from gradexp.report.records import cells, label_of, value_at
from gradexp.report.specs import Planner
from gradexp.report.thesis import Thesis, read_thesis, thesis_of


@dataclass(frozen=True)
class Value:
    """One number of one run; error: its standard error inside the run, over noise draws, images or samples."""

    value: float
    error: float | None = None

    @classmethod
    def of(cls, record: Config, metric: str, x: str | None, column: str) -> Value:
        """A record's metric; of a curve, its value where `x` is the column. Raises UserError for one that it does not have."""
        return cls(value_at(record, metric, x, column), _error(record, metric))


def _error(record: Config, metric: str) -> float | None:
    """Standard error inside a run: from its deviation over images or draws, or from its binomial interval (95 %)."""
    metrics = record["metrics"]
    spread, low, high = (metrics.get(f"{metric}/{name}") for name in ("std", "low", "high"))
    count = record.get("images") or record["config"].get("task", {}).get("draws")
    if spread is not None and count:
        return float(spread) / math.sqrt(count)
    return None if low is None or high is None else (high - low) / (2 * float(stats.norm.ppf(0.975)))


@dataclass(frozen=True)
class Place:
    """A cell that a claim names; a figure's column is a point or an x of its curves, '' where it has neither."""

    row: str
    column: str
    metric: str | None = None


class Grid:
    """A table, or a panel of a figure, whose rows are its series."""

    def __init__(self, item: str, panel: str | None, scale: str, plan: Planner) -> None:
        kind, _, number = item.partition(" ")
        if kind not in ("table", "figure"):
            raise UserError(f"item {item!r}: it is `table NUMBER` or `figure NUMBER`")
        self.spec, self.scale = specs.load(kind, number), scale
        self.comparable: bool = scale in self.spec.get("comparable", [scale])  # with the thesis's numbers
        rows = [row for row in self.spec["rows" if kind == "table" else "series"] if row.get("panel") == panel]
        if not rows:
            raise UserError(f"panel {panel!r}: {item} has {', '.join(map(str, self.spec.get('panels', {}))) or 'none'}")
        points = [x for row in rows for x in row.get("points", self.spec.get("points", []))]
        columns = self.spec["columns"] if kind == "table" else points
        self.rows, self.columns = {row["label"]: row for row in rows}, {label_of(column): column for column in columns}
        self._runs: dict[Any, dict[int, Run]] = {}  # by row and column, then by seed
        if scale in self.spec["seeds"]:
            frame = cells(self.spec, scale, plan)
            of_panel = frame["panel"].isna() if panel is None else frame["panel"] == panel
            own = frame[(frame["part"] == 0) & frame["run"].notna() & of_panel]
            groups = own.groupby(["row", "column"])
            self._runs = {cell: dict(zip(runs["seed"], runs["run"], strict=True)) for cell, runs in groups}

    def check(self, place: Place) -> None:
        """Raises UserError for a name that the table or figure does not have."""
        for what, name, known in (("row", place.row, self.rows), ("column", place.column, self.columns)):
            if known and name not in known:
                raise UserError(f"there is no {what} {name!r}{nearest(name, known)} It has {', '.join(known)}")

    def runs(self, place: Place) -> dict[int, Run]:
        """The cell's runs by seed; none where the scale does not have the cell."""
        return self._runs.get((place.row, place.column if self.columns else ""), {})

    def values(self, place: Place) -> dict[int, Value]:
        """The cell's numbers by seed, of the runs that are finished."""
        done = {seed: record for seed, run in self.runs(place).items() if (record := run.record())}
        metric, x = self.metric(place), self.spec.get("x")
        return {seed: Value.of(record, metric, x, place.column) for seed, record in done.items()}

    def metric(self, place: Place) -> str:
        """The recorded metric; `{fraction}` in its name stands for a column in per cent."""
        metric = place.metric or self._setting("metric", place)
        if not isinstance(metric, str):
            raise UserError(f"metric: say which{' of ' + ', '.join(metric) if metric else ''}")
        return metric.format(fraction=f"{float(place.column) / 100:g}") if "{" in metric else metric

    def thesis(self, place: Place) -> float | None:
        """The number that the thesis prints in this cell."""
        item: Any = self.spec.get("thesis", self.spec["number"])
        if isinstance(item, dict):
            return item.get(place.metric or "")
        metrics, quantities = self._setting("metric", place), self._setting("thesis_metric", place)
        if isinstance(quantities, list):
            quantities = quantities[metrics.index(self.metric(place))]
        if "series" in self.spec:
            printed = read_thesis().get((item, place.row, place.column), Thesis())
        else:
            printed = thesis_of(self.spec, *self._entry(place), quantities)
        return None if math.isnan(printed.value) else printed.value

    def _entry(self, place: Place) -> tuple[Config, Config]:
        return self.rows.get(place.row, {}), self.columns.get(place.column, {})

    def _setting(self, key: str, place: Place) -> Any:
        return specs.setting(key, *self._entry(place), self.spec)
