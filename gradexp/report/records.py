"""The one door to results: finished runs as rows of a pandas DataFrame."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from gradexp.base.errors import UserError, nearest
from gradexp.engine.compose import plan
from gradexp.engine.record import metric_of, read_record
from gradexp.engine.run import ROOT, Config, Run
from gradexp.report import specs
from gradexp.report.specs import Cell, Planner
from gradexp.report.thesis import Thesis, thesis_of

HEAD = ("experiment", "scale", "seed", "status", "started", "device", "precision", "parameters", "command")
HIDDEN = ("objective", "paths")  # of a config: the first is also the name of a metric


def records(
    *,
    table: str | None = None,
    figure: str | None = None,
    scale: str | None = None,
    results: str | Path = ROOT / "results",
    curves: bool = False,
) -> pd.DataFrame:
    """All finished runs, one row a run, indexed by id.

    Columns: `experiment`, `scale`, `seed`, `status`, `commit`, `dirty`, `device`, `seconds` (wall clock), `cpu_seconds`;
    every config key by its dotted name, such as `data.per_class`; `upstream.NAME`, the id of an upstream run; and every
    metric by its name, such as `test/accuracy`. What a run does not have is NaN.

    table, figure: only the runs behind this table or figure at `scale` (default `cpu`), one row for each metric that a cell
    shows, those that are missing included; further columns come first: `row`, `column` (of a figure: its series, and the
    point on its x-axis), `panel`, `metric`, `value`, `thesis` (the number that the thesis prints) and `finished`.
    curves: whether metrics that are lists are columns too. results: the folder that has `runs/`.

    Raises UserError for a table, figure or scale that there is not, and for a record that can't be read.
    """
    places = Path(results).expanduser().resolve()
    kind = "table" if table else "figure"
    if number := table or figure:
        extra = () if places == ROOT / "results" else (f"paths.results={places}",)
        shown = cells(specs.load(kind, number), scale or "cpu", partial(plan, extra=extra))
        shown = shown[shown["run"].notna()].astype({"seed": int}).reset_index(drop=True)
        known = {run.id: _row(record, curves) for run in shown["run"] if (record := run.record())}
        rows = [{name: value for name, value in known.get(run.id, {}).items() if name != "seed"} for run in shown["run"]]
        head = shown.assign(id=[run.id for run in shown["run"]], command=[run.command for run in shown["run"]])
        hidden = ["run", "part", "spread", "thesis_std", "thesis_bold"]
        return head.drop(columns=hidden).join(pd.DataFrame(rows).drop(columns="command", errors="ignore"))
    found = [read_record(file) for file in sorted(places.glob("runs/*/*.json"))]
    rows = [{"id": record["id"], **_row(record, curves)} for record in found if scale in (None, record["scale"])]
    return pd.DataFrame(rows, columns=None if rows else ["id", *HEAD]).set_index("id")


def _row(record: Config, curves: bool) -> Config:
    config = {key: value for key, value in record["config"].items() if key not in HIDDEN}
    return {
        **{name: record.get(name) for name in HEAD},
        "commit": record["git"]["commit"],
        "dirty": record["git"]["dirty"],
        "seconds": record["seconds"]["wall"],
        "cpu_seconds": record["seconds"]["cpu"],
        **{f"upstream.{name}": below["id"] for name, below in record.get("upstream", {}).items()},
        **{name: value for name, value in _flat(config, "") if name not in HEAD},
        **{name: value for name, value in record["metrics"].items() if curves or not isinstance(value, list)},
    }


def _flat(config: Config, prefix: str) -> Iterator[tuple[str, Any]]:
    """{"optim": {"passes": 3}} -> ("optim.passes", 3)."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --- the runs of a table or figure ------------------------------------------------------------------------


def cells(spec: Config, scale: str, plan: Planner) -> pd.DataFrame:
    """One row for each seed and metric of each cell of a table or figure, finished or not, in the order of the cells.

    Columns: row, column, panel; part (the number of the metric in its cell), metric; seed, run, finished; value (NaN where the
    run is missing, diverged, or has a curve), spread (the deviation inside the run, where the table shows it); thesis,
    thesis_std, thesis_bold. A cell that the scale does not run has one row for each metric, whose run is None.
    """
    rows = []
    for cell in specs.cells(spec, scale):
        head = {"row": cell.row["label"], "column": label_of(cell.column), "panel": cell.row.get("panel")}
        shown = list(_metrics(spec, cell))
        runs: dict[int | None, Run | None] = {seed: plan(words) for seed, words in cell.commands.items()}
        for seed, run in (runs or {None: None}).items():
            record = run.record() if run else None
            for part, (metric, spread, printed) in enumerate(shown):
                rows.append(
                    {
                        **head,
                        "part": part,
                        "metric": metric,
                        "seed": seed,
                        "run": run,
                        "finished": record is not None,
                        "value": number(record, metric),
                        "spread": number(record, spread),
                        "thesis": printed.value,
                        "thesis_std": printed.std,
                        "thesis_bold": printed.bold,
                    }
                )
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64", "run": object})


COLUMNS = ["row", "column", "panel", "part", "metric", "seed", "run", "finished", "value", "spread"]
COLUMNS += ["thesis", "thesis_std", "thesis_bold"]


def _metrics(spec: Config, cell: Cell) -> Iterator[tuple[str | None, str | None, Thesis]]:
    """(metric, spread, the thesis's number) of all that a cell shows."""
    keys = ("metric", "spread", "thesis_metric")
    metric, spread, quantity = (specs.setting(key, cell.row, cell.column, spec) for key in keys)
    for name, theirs in zip_longest(*(value if isinstance(value, list) else [value] for value in (metric, quantity))):
        yield name, spread, Thesis() if "series" in spec else thesis_of(spec, cell.row, cell.column, theirs)


def label_of(column: Config) -> str:
    """A column's label; of a figure's point its x."""
    return str(column["label"]) if "label" in column else f"{column['x']:g}" if "x" in column else ""


def number(record: Config | None, metric: str | None) -> float:
    """A recorded number; NaN where there is no record or no such question, where the run diverged, and for a curve."""
    if record is None or metric is None:
        return math.nan
    value = metric_of(record, metric)
    return math.nan if isinstance(value, list) else value


def value_at(record: Config, metric: str, x: str | None, column: str) -> float:
    """A recorded number, or the value of a curve where `x` is the column. Raises UserError where it is not drawn there."""
    value: Any = metric_of(record, metric)
    if isinstance(value, list):
        grid = [f"{each:g}" for each in record["metrics"].get(x, [])]
        if column not in grid:
            raise UserError(f"record {record['id']}: {metric} is a curve, not drawn at {column!r}{nearest(column, grid)}")
        value = value[grid.index(column)]
    return math.nan if value is None else float(value)
