"""What a table looks like: as Markdown, LaTeX, CSV, text for the terminal, and a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import rich.box
import rich.console
import rich.table

from gradexp.engine.run import Run
from gradexp.report.tables import ABSENT, CELL, Table
from gradexp.report.thesis import Thesis
from gradexp.report.writing import markdown, write_beside

EMPTY = "–"  # in the place of a number that is missing
COLUMNS = ["row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids"]

# --- cells as text ----------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A cell as text, with all its metrics, and the runs behind it.

    mean: our mean ± standard deviation; ours: the same with the number of seeds where the table has several; gap: ours minus
    the thesis's. best, bold: whether ours, and the thesis's, is marked as best. n, planned: finished seeds, and all of them.
    """

    mean: str
    ours: str
    thesis: str
    gap: str
    best: bool
    bold: bool
    n: int
    planned: int
    runs: list[Run]


def texts(table: Table) -> dict[tuple[str, str], Shown]:
    """The table's cells as text, by row and column."""
    runs = table.cells.groupby(CELL, sort=False)["run"].agg(lambda some: list(some.dropna().unique()))
    groups: Any = table.numbers.groupby(CELL, sort=False)
    return {cell: _shown(list(metrics.itertuples()), runs.loc[cell]) for cell, metrics in groups}


def _shown(metrics: list[Any], runs: list[Run]) -> Shown:
    """metrics: the cell's rows of `Table.numbers`."""
    first, last = metrics[0], metrics[-1]
    mean = " / ".join(map(_mean, metrics)) if last.n else EMPTY
    count = f" (n={last.n})" if last.n and last.planned > 1 else ""
    return Shown(
        mean=mean,
        ours=mean + count if last.planned else ABSENT,
        thesis=" / ".join(printed for row in metrics if (printed := str(Thesis(row.thesis, std=row.thesis_std)))),
        gap=" / ".join(f"{row.difference:+.2f}".replace("-", "−") for row in metrics if pd.notna(row.difference)),
        best=last.best,
        bold=first.thesis_bold,
        n=last.n,
        planned=last.planned,
        runs=runs,
    )


def _mean(row: Any) -> str:
    return f"{row.ours:.2f}".replace("nan", "NaN") + (f" ± {row.std:.2f}" if pd.notna(row.std) else "")


def wide(table: Table, show: Callable[[Shown], str]) -> pd.DataFrame:
    """The table as it is printed: one line a row, its label first."""
    cells = texts(table)
    lines = [[row, *(show(cells[row, column]) for column in table.columns)] for row in table.rows]
    return pd.DataFrame(lines, columns=[table.corner, *table.columns])


# --- files ------------------------------------------------------------------------------------------------


def to_csv(table: Table) -> str:
    """One line for each metric of each cell. Deviations and differences that are not defined stay empty."""
    done = table.cells[table.cells["finished"]].groupby([*CELL, "part"])["run"]
    ids = done.agg(lambda runs: " ".join(run.id for run in runs)).rename("run_ids")
    frame = table.numbers.join(ids, on=[*CELL, "part"])
    diverged = frame["ours"].isna() & (frame["n"] > 0)
    for name in ("ours", "std", "difference"):
        frame[name] = frame[name].map("{:.4f}".format, na_action="ignore")
    frame["ours"] = frame["ours"].mask(diverged, "nan")
    frame["std"] = frame["std"].mask(diverged & (frame["n"] > 1), "nan")
    frame["thesis"] = frame["thesis"].map("{:g}".format, na_action="ignore")
    return frame.to_csv(columns=COLUMNS, index=False)


def to_markdown(table: Table) -> str:
    def show(cell: Shown) -> str:
        mine = f"**{cell.ours}**" if cell.best else cell.ours
        if not cell.thesis:
            return mine
        theirs = f"**{cell.thesis}**" if cell.bold else cell.thesis
        return f"{mine}<br>thesis {theirs}" + (f" ({cell.gap})" if cell.gap else "")

    lines = [f"**{_name(table)}** {table.title}", "", *markdown(wide(table, show)), ""]
    lines += [f"- {sentence}" for sentence in table.caption]
    done = [(*name, links(cell.runs)) for name, cell in texts(table).items() if cell.n]
    if done:
        records = pd.DataFrame(done, columns=[*CELL, "records"])
        lines += ["", "<details><summary>Records</summary>", "", *markdown(records), "", "</details>"]
    if table.missing:
        lines += ["", "Missing runs:", "", "```", *(run.command for run in table.missing), "```"]
    return "\n".join(lines) + "\n"


def links(runs: Sequence[Run]) -> str:
    """The finished runs, each as a link from a page under results/ to its record."""
    return " ".join(f"[{run.id}](../../runs/{run.name}/{run.id}.json)" for run in runs if run.finished)


LATEX = str.maketrans(
    {"β": r"$\beta$", "λ": r"$\lambda$", "μ": r"$\mu$", "σ": r"$\sigma$", "Δ": r"$\Delta$", "ℓ": r"$\ell$", "×": r"$\times$"}
    | {"→": r"$\rightarrow$", "↓": r"$\downarrow$", "−": "$-$", "±": r"$\pm$", "–": "--", "τ": r"$\tau$", "½": r"$\frac{1}{2}$"}
    | {"∇": r"$\nabla$", "‖": r"$\|$", "²": "$^2$", "§": r"\S ", "ψ": r"$\psi$"}
    | {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash "}
)


def to_latex(table: Table) -> str:
    def show(cell: Shown) -> str:
        mine = rf"\textbf{{{latex(cell.ours)}}}" if cell.best else latex(cell.ours)
        if not cell.thesis:
            return mine
        theirs = rf"\textbf{{{latex(cell.thesis)}}}" if cell.bold else latex(cell.thesis)
        return f"{mine} ({theirs})"

    frame = wide(table, show).rename(columns=latex)
    frame.iloc[:, 0] = frame.iloc[:, 0].map(latex)
    sentences = [table.title, "In parentheses: the thesis.", *(sentence.replace("`", "") for sentence in table.caption)]
    return frame.style.hide(axis="index").to_latex(
        caption=" ".join(map(latex, sentences)),
        column_format="l" + "c" * len(table.columns),
        position_float="centering",
        hrules=True,
    )


def latex(text: str) -> str:
    return text.translate(LATEX)


# --- for the eye ------------------------------------------------------------------------------------------


def to_text(table: Table) -> str:
    """For the terminal: ours above, the thesis's number below in parentheses; * marks the best of a column."""

    def show(cell: Shown) -> str:
        return cell.ours + ("*" if cell.best else "") + (f"\n({cell.thesis})" if cell.thesis else "")

    screen = io.StringIO()
    # So wide that no cell is broken; without colours, whatever the environment asks for.
    rich.console.Console(width=1000, markup=False, force_terminal=False, file=screen).print(_grid(table, show))
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    best = f"* best of its {table.best_per}; " if table.best_per else ""
    lines += [f"{best}in parentheses: the thesis's number", *table.caption]
    if table.missing:
        lines += ["", "Missing runs:", *(f"  {run.command}" for run in table.missing)]
    return "\n".join([f"{_name(table)} {table.title}", *lines]) + "\n"


def to_svg(table: Table) -> str:
    """A picture for pages: ours in front, the thesis's number dim behind it."""

    def show(cell: Shown) -> str:
        mine = f"[bold]{cell.ours}[/bold]" if cell.best else cell.ours
        return f"{mine} [dim]{cell.thesis}[/dim]" if cell.thesis else mine

    grid = _grid(table, show)
    grid.title = f"{_name(table)} {table.title}"
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(grid)
    best = f"bold: best of its {table.best_per}; " if table.best_per else ""
    console.print(f"{best}dim: the thesis", style="dim", justify="center")
    # The exporter's fonts come from the network; a picture in a repository must not need one.
    return re.sub(r"@font-face \{[^}]*\}\s*", "", console.export_svg(title="gradexp"))


def _name(table: Table) -> str:
    return f"Table {table.number}, scale={table.scale}."


def _grid(table: Table, show: Callable[[Shown], str]) -> rich.table.Table:
    frame = wide(table, show)
    grid = rich.table.Table(box=rich.box.HORIZONTALS)
    for number, name in enumerate(frame.columns):
        grid.add_column(name, justify="right" if number else "left")
    for line in frame.itertuples(index=False):
        grid.add_row(*line)
    return grid


def write(table: Table, results: Path) -> list[Path]:
    """Writes the files of a table under results/tables/<scale>/."""
    stem = results / "tables" / table.scale / f"table_{table.number.replace('.', '_')}"
    contents = {"md": to_markdown(table), "csv": to_csv(table), "tex": to_latex(table), "svg": to_svg(table)}
    return write_beside(stem, contents)
