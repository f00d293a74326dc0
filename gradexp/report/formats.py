"""What a table looks like: as Markdown, LaTeX, CSV, text for the terminal, and a picture."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import rich.box
import rich.console
import rich.table

from gradexp.report.tables import ABSENT, EMPTY, Cell, Table
from gradexp.report.writing import as_csv, write_beside

COLUMNS = ("row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids")


def number(value: float | None) -> str:
    return EMPTY if value is None else "NaN" if value != value else f"{value:.2f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def ours(cell: Cell) -> str:
    """Mean, ± standard deviation over seeds, and their number where the table has several; all metrics of the cell."""
    if not cell.runs:
        return ABSENT
    if cell.others and not cell.values:
        return EMPTY
    count = f" (n={len(cell.values)})" if cell.values and len(cell.runs) > 1 else ""
    return plain(cell) + count


def plain(cell: Cell) -> str:
    """The same without the number of seeds."""
    spreads = ["" if c.std is None or math.isnan(c.std) else f" ± {c.std:.2f}" for c in cell.parts]
    return " / ".join(number(c.ours) + spread for c, spread in zip(cell.parts, spreads, strict=True))


def printed(cell: Cell) -> str:
    """The thesis's number, or numbers; '' where it prints none."""
    return " / ".join(str(part.thesis) for part in cell.parts if part.thesis)


def gap(cell: Cell) -> str:
    """Ours minus the thesis's, where they may be compared."""
    return " / ".join(signed(part.difference) for part in cell.parts if part.difference is not None)


def to_csv(table: Table) -> str:
    rows = []
    for c in (part for cell in table.cells for part in cell.parts):
        done = [run.id for run in c.runs if run.finished]
        plain = [("" if x is None else f"{x:.4f}") for x in (c.ours, c.std)]
        thesis = "" if c.thesis is None else f"{c.thesis.value:g}"
        difference = "" if c.difference is None else f"{c.difference:.4f}"
        values = (c.row, c.column, c.metric, *plain, len(c.values), thesis, difference, " ".join(done))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return as_csv(COLUMNS, rows)


def to_markdown(table: Table) -> str:
    def cell(c: Cell) -> str:
        mine = f"**{ours(c)}**" if c.best else ours(c)
        if c.thesis is None:
            return mine
        theirs = f"**{printed(c)}**" if c.thesis.bold else printed(c)
        return f"{mine}<br>thesis {theirs}" + (f" ({gap(c)})" if gap(c) else "")

    lines = [f"**Table {table.number}, scale={table.scale}.** {table.title}", ""]
    lines += ["| " + " | ".join([table.corner, *table.columns]) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [
        "| " + " | ".join([row, *(cell(table.cell(row, column)) for column in table.columns)]) + " |" for row in table.rows
    ]
    lines += ["", *(f"- {sentence}" for sentence in table.caption)]
    filled = [(c, s) for c in table.cells for s in c.runs if s.finished]
    if filled:
        lines += ["", "<details><summary>Records</summary>", "", "| row | column | records |", "|---|---|---|"]
        for c in table.cells:
            links = [f"[{s.id}](../../runs/{s.name}/{s.id}.json)" for s in c.runs if s.finished]
            if links:
                lines.append(f"| {c.row} | {c.column} | {' '.join(links)} |")
        lines += ["", "</details>"]
    if table.missing:
        lines += ["", "Missing runs:", "", "```", *(run.command for run in table.missing), "```"]
    return "\n".join(lines) + "\n"


LATEX = str.maketrans(
    {"β": r"$\beta$", "λ": r"$\lambda$", "μ": r"$\mu$", "σ": r"$\sigma$", "Δ": r"$\Delta$", "ℓ": r"$\ell$", "×": r"$\times$"}
    | {"→": r"$\rightarrow$", "↓": r"$\downarrow$", "−": "$-$", "±": r"$\pm$", "–": "--", "τ": r"$\tau$", "½": r"$\frac{1}{2}$"}
    | {"∇": r"$\nabla$", "‖": r"$\|$", "²": "$^2$", "§": r"\S ", "ψ": r"$\psi$"}
)


def to_latex(table: Table) -> str:
    def text(words: str) -> str:
        for plain, escaped in (("\\", r"\textbackslash "), *((x, "\\" + x) for x in "&%$#_{}")):
            words = words.replace(plain, escaped)
        return words.translate(LATEX)

    def cell(c: Cell) -> str:
        mine = text(ours(c))
        mine = rf"\textbf{{{mine}}}" if c.best else mine
        if c.thesis is None:
            return mine
        theirs = rf"\textbf{{{text(printed(c))}}}" if c.thesis.bold else text(printed(c))
        return f"{mine} ({theirs})"

    body = [
        " & ".join([text(row), *(cell(table.cell(row, column)) for column in table.columns)]) + r" \\" for row in table.rows
    ]
    caption = " ".join([text(table.title), "In parentheses: the thesis.", *(text(x.replace("`", "")) for x in table.caption)])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join([text(table.corner), *map(text, table.columns)]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_text(table: Table) -> str:
    """For the terminal: ours above, the thesis's number below in parentheses; * marks the best of a column."""

    def cell(c: Cell) -> str:
        return ours(c) + ("*" if c.best else "") + (f"\n({printed(c)})" if c.thesis else "")

    screen = io.StringIO()
    # So wide that no cell is broken; without colours, whatever the environment asks for.
    rich.console.Console(width=1000, markup=False, force_terminal=False, file=screen).print(_grid(table, cell))
    lines = [line.rstrip() for line in screen.getvalue().splitlines()]
    best = f"* best of its {table.best_per}; " if table.best_per else ""
    lines += [f"{best}in parentheses: the thesis's number", *table.caption]
    if table.missing:
        lines += ["", "Missing runs:", *(f"  {run.command}" for run in table.missing)]
    return "\n".join([_title(table), *lines]) + "\n"


def to_svg(table: Table) -> str:
    """A picture for pages: ours in front, the thesis's number dim behind it."""

    def cell(c: Cell) -> str:
        mine = f"[bold]{ours(c)}[/bold]" if c.best else ours(c)
        return f"{mine} [dim]{printed(c)}[/dim]" if c.thesis else mine

    grid = _grid(table, cell)
    grid.title = _title(table)
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(grid)
    best = f"bold: best of its {table.best_per}; " if table.best_per else ""
    console.print(f"{best}dim: the thesis", style="dim", justify="center")
    # The exporter's fonts come from the network; a picture in a repository must not need one.
    return re.sub(r"@font-face \{[^}]*\}\s*", "", console.export_svg(title="gradexp"))


def _title(table: Table) -> str:
    return f"Table {table.number}, scale={table.scale}. {table.title}"


def _grid(table: Table, show: Callable[[Cell], str]) -> rich.table.Table:
    grid = rich.table.Table(box=rich.box.HORIZONTALS)
    grid.add_column(table.corner)
    for column in table.columns:
        grid.add_column(column, justify="right")
    for row in table.rows:
        grid.add_row(row, *(show(table.cell(row, column)) for column in table.columns))
    return grid


def write(table: Table, results: Path) -> list[Path]:
    """Writes the files of a table under results/tables/<scale>/."""
    stem = results / "tables" / table.scale / f"table_{table.number.replace('.', '_')}"
    contents = {"md": to_markdown(table), "csv": to_csv(table), "tex": to_latex(table), "svg": to_svg(table)}
    return write_beside(stem, contents)
