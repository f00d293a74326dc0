"""A table as Markdown, LaTeX, CSV, text for the terminal, and SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import rich.console
from rich.markup import escape

from gradexp.engine.run import Config
from gradexp.report.tables import CELL, Table
from gradexp.report.writing import csv, grid, one_line, printed, rendered, stem_of, write_beside

COLUMNS = ["row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids"]


def wide(table: Table, show: Callable[[Config], str], label: Callable[[str], str] = one_line) -> pd.DataFrame:
    """The table as it is printed, one line a row, its label first. show, label: the text of a cell, of a label."""
    rows = [[label(row), *map(show, cells)] for row, cells in table.by_row.items()]
    return pd.DataFrame(rows, columns=[label(name) for name in (table.spec["corner"], *table.columns)])


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

    def show(cell: Config) -> str:
        return f"{cell['ours']}{'*' if cell['best'] else ''}" + (f"\n({cell['thesis']})" if cell["thesis"] else "")

    return rendered("table.txt", table=table, printed=printed(wide(table, show)))


def to_markdown(table: Table) -> str:
    return rendered("table.md", table=table)


def to_latex(table: Table) -> str:
    return rendered("table.tex", table=table)


def to_svg(table: Table) -> str:
    """A picture: ours, and dimmed the thesis's number."""

    def show(cell: Config) -> str:
        ours = f"[bold]{cell['ours']}[/bold]" if cell["best"] else cell["ours"]
        return f"{ours} [dim]{cell['thesis']}[/dim]" if cell["thesis"] else str(ours)

    picture = grid(wide(table, show, _no_markup))
    picture.title = _no_markup(f"{table.head} {table.title}")
    console = rich.console.Console(record=True, width=100, emoji=False, file=io.StringIO())
    console.print(picture)
    best = f"bold: best of its {table.best_per}; " if table.best_per else ""
    console.print(f"{best}dim: the thesis", style="dim", justify="center")
    # rich's fonts are loaded from the network, which a committed picture must not need.
    return re.sub(r"@font-face \{[^}]*\}\s*", "", console.export_svg(title="gradexp"))


def _no_markup(text: str) -> str:
    """The text for rich, which takes `[...]` for markup."""
    return escape(one_line(text))


def write(table: Table, results: Path) -> list[Path]:
    """Write the files of a table to results/tables/<scale>/."""
    contents = {"md": to_markdown(table), "csv": to_csv(table), "tex": to_latex(table), "svg": to_svg(table)}
    return write_beside(stem_of("table", table.number, table.scale, results), contents)
