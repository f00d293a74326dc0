"""Finished runs, and the cells of tables and figures, as pandas DataFrames."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from gradexp.base.errors import UserError
from gradexp.engine.compose import plan
from gradexp.engine.record import Record, metric_of, read_record, value_of
from gradexp.engine.run import ROOT, Config, Run, record_files
from gradexp.report import specs
from gradexp.report.specs import Cell, Planner, Spec, Thesis, label_of, thesis_of

HEAD = ("experiment", "scale", "seed", "status", "started", "device", "precision", "parameters", "command")
COLUMNS = ["row", "column", "panel", "part", "metric", "seed", "run", "finished", "value", "spread"]
COLUMNS += ["thesis", "thesis_std", "thesis_bold"]  # of a frame of cells
HIDDEN = ("objective", "paths")  # keys of a config; `objective` is also the name of a metric


def records(
    *,
    table: str | None = None,
    figure: str | None = None,
    scale: str | None = None,
    results: str | Path = ROOT / "results",
    curves: bool = False,
) -> pd.DataFrame:
    """All finished runs, one row per run, indexed by id.

    Columns: `experiment`, `scale`, `seed`, `status`, `started`, `device`, `precision`, `parameters`, `command`, `commit`,
    `dirty`, `seconds` (wall clock), `cpu_seconds`; every config key by its dotted name, such as `data.per_class`;
    `upstream.NAME`, the id of an upstream run; and every metric by its name, such as `test/accuracy`. NaN for what a run does
    not have.

    table, figure: only the runs behind this table or figure at `scale` (default `cpu`), missing ones included, one row for
    each metric that a cell shows, numbered from 0; further columns come first: `row`, `column` (of a figure: its series, and
    the point on its x-axis), `panel`, `metric`, `seed`, `finished`, `value`, `thesis` (the number that the thesis prints; NaN
    for figures) and `id`.
    curves: whether metrics that are lists are columns, too. results: the folder that contains `runs/`.

    Raises UserError for an unknown table, figure or scale, both a table and a figure, a folder that is not there, and a record
    that can't be read.
    """
    folder = Path(results).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"results={folder}: there is no such folder; give the one that contains runs/")
    if table and figure:
        raise UserError(f"table={table} and figure={figure}: give one of them")
    if number := table or figure:
        extra = () if folder == ROOT / "results" else (f"paths.results={folder}",)
        shown = cells(specs.load("table" if table else "figure", str(number)), scale or "cpu", partial(plan, extra=extra))
        shown = shown[shown["run"].notna()].astype({"seed": int}).reset_index(drop=True)
        shown = shown.assign(id=[run.id for run in shown["run"]], command=[run.command for run in shown["run"]])
        finished = shown.drop_duplicates("id")["run"]
        facts = _frame([record for run in finished if (record := run.record())], curves).drop(columns=["seed", "command"])
        return shown.drop(columns=["run", "part", "spread", "thesis_std", "thesis_bold"]).join(facts, on="id")
    if scale not in (None, "paper", "cpu", "quick"):
        raise UserError(f"scale={scale}: expected paper, cpu or quick")
    every = [read_record(file) for file in record_files(folder)]
    return _frame([record for record in every if scale in (None, record["scale"])], curves)


def _frame(found: Sequence[Record], curves: bool) -> pd.DataFrame:
    """One row per record, indexed by id."""
    rows = [{"id": record["id"], **_row(record, curves)} for record in found]
    return pd.DataFrame(rows, columns=None if rows else ["id", *HEAD]).set_index("id")


def _row(record: Record, curves: bool) -> dict[str, Any]:
    config = {key: value for key, value in record["config"].items() if key not in HIDDEN}
    return {
        **{name: record.get(name) for name in HEAD},
        "commit": record["git"]["commit"],
        "dirty": record["git"]["dirty"],
        "seconds": record["seconds"]["wall"],
        "cpu_seconds": record["seconds"]["cpu"],
        **{f"upstream.{name}": below["id"] for name, below in record.get("upstream", {}).items()},
        **{name: value for name, value in _flat(config) if name not in HEAD},
        **{name: value for name, value in record["metrics"].items() if curves or not isinstance(value, list)},
    }


def _flat(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"optim": {"passes": 3}} -> ("optim.passes", 3)."""
    for key, value in config.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def cells(spec: Spec, scale: str, plan: Planner) -> pd.DataFrame:
    """One row for each seed and metric of each cell of a table or figure, finished or not, in the order of the cells.

    Columns: row, column, panel; part (the number of the metric in its cell), metric; seed, run, finished; value (NaN if the run
    is missing or diverged, or recorded a curve), spread (the deviation inside the run, if the table shows it); thesis,
    thesis_std, thesis_bold. A cell that the scale does not run has one row for each metric, with None as its run.
    """
    rows = []
    for cell in specs.cells(spec, scale):
        head = (cell.row["label"], label_of(cell.column), cell.row.get("panel"))
        shown = list(_metrics(spec, cell))
        runs: dict[int | None, Run | None] = {seed: plan(words) for seed, words in cell.commands.items()}
        for seed, run in (runs or {None: None}).items():
            record = run.record() if run else None
            for part, (metric, spread, thesis) in enumerate(shown):
                read = number if "series" in spec else _cell_number
                numbers = (read(record, metric), read(record, spread), thesis.value, thesis.std, thesis.bold)
                rows.append((*head, part, metric, seed, run, record is not None, *numbers))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64", "run": object})


def _metrics(spec: Spec, cell: Cell) -> Iterator[tuple[str | None, str | None, Thesis]]:
    """(metric, spread, the thesis's number) for each number of a cell."""
    keys = ("metric", "spread", "thesis_metric")
    metric, spread, quantity = (specs.setting(key, cell.row, cell.column, spec) for key in keys)
    for name, printed in zip_longest(*(value if isinstance(value, list) else [value] for value in (metric, quantity))):
        if name is None and "series" not in spec and metric is None:
            where = f"table {spec['number']}, row {cell.row['label']}, column {label_of(cell.column)}"
            raise UserError(f"{where}: no metric is named; add `metric: test/accuracy`, or another one, to the table")
        yield name, spread, Thesis() if "series" in spec else thesis_of(spec, cell.row, cell.column, printed)


def _cell_number(record: Record | None, metric: str | None) -> float:
    """As `number`, of a table's cell: raises UserError for a curve, which would look as if the run had diverged."""
    return math.nan if record is None or metric is None else value_of(record, metric)


def number(record: Record | None, metric: str | None) -> float:
    """A recorded number; NaN without a record or metric, for a diverged run, and for a curve."""
    if record is None or metric is None:
        return math.nan
    value = metric_of(record, metric)
    return math.nan if isinstance(value, list) else value
