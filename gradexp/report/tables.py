"""A table of the thesis from records, and its files: Markdown, CSV, LaTeX and SVG, and text for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from gradexp.engine.run import Run
from gradexp.report import provenance, records
from gradexp.report.provenance import Caption
from gradexp.report.specs import Planner, TableSpec
from gradexp.report.writing import csv, one_line, printed, rendered, stem_of, write_beside

CELL = ["row", "column"]
COLUMNS = ["row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids"]  # of the CSV file
EMPTY = "–"  # shown in a cell without a finished run
ABSENT = "n/a"  # shown in a cell that the scale does not run


@dataclass(frozen=True, eq=False)
class Table:
    """A table at one scale.

    cells: records.cells, one row for each seed and metric of a cell; numbers: `summary`, one row for each metric of a cell.
    """

    spec: TableSpec
    scale: str
    title: str
    cells: pd.DataFrame
    numbers: pd.DataFrame
    caption: Caption

    @property
    def number(self) -> str:
        return str(self.spec["number"])

    @property
    def head(self) -> str:
        return f"Table {self.number}, scale={self.scale}."

    @property
    def best_per(self) -> str | None:
        """What has one best number each; None if none is marked."""
        marked = self.spec["best"] or any(column.get("best") for column in self.spec["columns"])
        return self.spec.get("best_per", "column") if marked else None

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

    @cached_property
    def by_row(self) -> dict[str, list[dict[str, Any]]]:
        """{label of a row: its cells, as rows of `texts`}"""
        cells: Any = self.texts.reset_index().to_dict("records")
        return {row: list(own) for row, own in groupby(cells, key=lambda cell: cell["row"])}

    @cached_property
    def texts(self) -> pd.DataFrame:
        """The cells as text, one row each, indexed by row and column; several metrics are separated by ` / `.

        mean: our mean ± standard deviation; ours: the same with the number of seeds if several are planned; thesis; gap: ours
        minus the thesis's; best, bold: whether our number, and the thesis's, is marked as best; metric, n, planned, runs.
        """
        numbers: Any = self.numbers

        def formatted(name: str, form: str) -> pd.Series[str]:
            return numbers[name].map(form.format, na_action="ignore").fillna("")

        parts = {
            "mean": numbers["ours"].map("{:.2f}".format).str.replace("nan", "NaN") + formatted("std", " ± {:.2f}"),
            "thesis": formatted("thesis", "{:g}") + formatted("thesis_std", " ± {:g}"),
            "gap": formatted("difference", "{:+.2f}").str.replace("-", "−"),
            "metric": numbers["metric"].fillna(""),
        }
        texts = numbers[CELL].assign(**parts).groupby(CELL, sort=False).agg(lambda cell: " / ".join(filter(None, cell)))
        texts["bold"] = numbers.drop_duplicates(CELL).set_index(CELL)["thesis_bold"]
        texts = texts.join(numbers.drop_duplicates(CELL, keep="last").set_index(CELL)[["best", "n", "planned"]])
        texts["mean"] = texts["mean"].where(texts["n"] > 0, EMPTY)
        seeds = (" (n=" + texts["n"].astype(str) + ")").where((texts["n"] > 0) & (texts["planned"] > 1), "")
        texts["ours"] = (texts["mean"] + seeds).where(texts["planned"] > 0, ABSENT)
        texts["runs"] = self.cells.groupby(CELL)["run"].agg(lambda runs: list(runs.dropna().unique()))
        return texts


def summary(cells: pd.DataFrame, spec: TableSpec, scale: str) -> pd.DataFrame:
    """Mean and deviation over the finished seeds of each cell.

    One row for each metric of each cell: row, column, part, metric; ours, std, n; planned (seeds, finished or not); thesis,
    thesis_std, thesis_bold; difference (ours - thesis, NaN if the scale is not comparable); best; inside (whether std is the
    deviation inside the runs, over draws or images, instead of over seeds).
    """
    groups = cells.groupby([*CELL, "part"], sort=False)
    numbers = pd.DataFrame([_number(group) for _, group in groups])
    numbers["difference"] = numbers["ours"] - numbers["thesis"] if scale in spec["comparable"] else math.nan
    numbers["best"] = best(numbers, spec)
    return numbers


def _number(cell: pd.DataFrame) -> dict[str, Any]:
    """Mean and standard deviation of the sample over finished runs; NaN if one diverged."""
    first, done = cell.iloc[0], cell[cell["finished"]]
    inside = bool(done["spread"].notna().any())
    return {
        **first[[*CELL, "part", "metric", "thesis", "thesis_std", "thesis_bold"]],
        "ours": done["value"].mean(skipna=False),
        "std": math.sqrt((done["spread"] ** 2).mean(skipna=False)) if inside else done["value"].std(skipna=False),
        "n": len(done),
        "planned": int(cell["run"].notna().sum()),
        "inside": inside,
    }


def best(numbers: pd.DataFrame, spec: TableSpec) -> pd.Series[bool]:
    """Whether a cell is the best of its column, row or table (`best_per`), if at least two of its cells are filled.

    The last metric of a cell decides. Rows marked `apart`, such as an oracle, do not compete.
    """
    own = {column["label"]: column["best"] for column in spec["columns"] if "best" in column}
    apart = [row["label"] for row in spec["rows"] if row.get("apart")]
    last = numbers.drop_duplicates(CELL, keep="last")
    wanted = last["column"].map(lambda column: own.get(column, spec["best"]))
    competing = last[last["ours"].notna() & ~last["row"].isin(apart) & wanted.notna()]
    scores = competing["ours"].where(wanted[competing.index] == "max", -competing["ours"])
    per = spec.get("best_per", "column")
    groups = scores.groupby([competing[per] if per in CELL else pd.Series("", competing.index), wanted[competing.index]])
    won = competing[(scores == groups.transform("max")) & (groups.transform("size") > 1)]
    cells = pd.MultiIndex.from_frame(numbers[CELL])
    return pd.Series(cells.isin(pd.MultiIndex.from_frame(won[CELL])), numbers.index)


def build(spec: TableSpec, scale: str, plan: Planner) -> Table:
    """The table that `conf/table/NUMBER.yaml` describes, filled with the records that exist."""
    cells = records.cells(spec, scale, plan)
    numbers = summary(cells, spec, scale)
    runs = list(cells["run"].dropna().unique())
    data = sorted({run.config["data"]["name"] for run in runs})
    title = spec["title"].format(data=", ".join(data), where=spec.get("where", {}).get(scale))
    caption = provenance.caption(spec, scale, runs, plan, printed=bool(numbers["thesis"].notna().any()))
    return Table(spec, scale, title, cells, numbers, caption)


# --- files ------------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """One line for each metric of each cell. Undefined deviations and differences are empty, numbers of diverged runs `nan`."""
    done = table.cells[table.cells["finished"]].groupby([*CELL, "part"])["run"]
    ids = done.agg(lambda runs: " ".join(run.id for run in runs)).rename("run_ids")
    frame = table.numbers.join(ids, on=[*CELL, "part"])
    diverged = frame["ours"].isna() & (frame["n"] > 0)
    for name in ("ours", "std", "difference"):
        frame[name] = frame[name].map("{:.4f}".format, na_action="ignore")
    frame["ours"] = frame["ours"].mask(diverged, "nan")
    frame["std"] = frame["std"].mask(diverged & (frame["n"] > 1), "nan")
    frame["thesis"] = frame["thesis"].map("{:g}".format, na_action="ignore")
    return csv(frame[COLUMNS])


def to_text(table: Table) -> str:
    """For the terminal: ours above, the thesis's number below in parentheses; * marks the best of a column."""

    def show(cell: dict[str, Any]) -> str:
        return f"{cell['ours']}{'*' if cell['best'] else ''}" + (f"\n({cell['thesis']})" if cell["thesis"] else "")

    rows = [[one_line(row), *map(show, cells)] for row, cells in table.by_row.items()]
    frame = pd.DataFrame(rows, columns=[one_line(name) for name in (table.spec["corner"], *table.columns)])
    return rendered("table.txt", table=table, printed=printed(frame))


def to_markdown(table: Table) -> str:
    return rendered("table.md", table=table)


def to_latex(table: Table) -> str:
    return rendered("table.tex", table=table)


def to_svg(table: Table) -> str:
    """A picture: ours, and in grey the thesis's number beside it. It needs no fonts from the network."""
    return rendered("table.svg", table=table)


def write(table: Table, results: Path) -> list[Path]:
    """Write the files of a table to results/tables/<scale>/."""
    contents = {"md": to_markdown(table), "csv": to_csv(table), "tex": to_latex(table), "svg": to_svg(table)}
    return write_beside(stem_of("table", table.number, table.scale, results), contents)
