"""A table as Markdown, LaTeX, CSV, text for the terminal, and SVG."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import rich.console
from rich.markup import escape

from gradexp.report.tables import CELL, Table
from gradexp.report.writing import csv, grid, one_line, plain, printed, rendered, stem_of, write_beside

COLUMNS = ["row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids"]


def wide(table: Table, show: Callable[[Any], str], label: Callable[[str], str] = one_line) -> pd.DataFrame:
    """The table as it is printed, one line a row, its label first.

    show: the text of a row of Table.texts; label: the text of a label.
    """
    cells = pd.Series({cell.Index: show(cell) for cell in table.texts.itertuples()})
    frame = cells.unstack().reindex(index=table.rows, columns=table.columns)
    frame.insert(0, table.corner, frame.index.map(label), allow_duplicates=True)
    return frame.rename(columns=label)


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


def to_markdown(table: Table) -> str:
    def show(cell: Any) -> str:
        ours = f"**{cell.ours}**" if cell.best else cell.ours
        if not cell.thesis:
            return ours
        thesis = f"**{cell.thesis}**" if cell.bold else cell.thesis
        return f"{ours}<br>thesis {thesis}" + (f" ({cell.gap})" if cell.gap else "")

    cells = table.texts[table.texts["n"] > 0].reset_index().to_dict("records")
    return rendered("table.md", table=table, frame=wide(table, show, plain), cells=cells)


LATEX = str.maketrans(
    {"×": r"$\times$", "→": r"$\rightarrow$", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "−": "$-$", "±": r"$\pm$", "–": "--"}
    | {"½": r"$\frac{1}{2}$", "∇": r"$\nabla$", "‖": r"$\|$", "²": "$^2$", "³": "$^3$", "§": r"\S ", "ℓ": r"$\ell$"}
    | {"·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "∞": r"$\infty$", "…": r"\ldots{}", "—": "---"}
    | {"’": "'", "‘": "`", "“": "``", "”": "''"}
    | {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash ", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"}
)
GREEK = "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ"  # those that LaTeX has by name
ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"'}
ACCENTS |= {"\u030a": "r ", "\u030c": "v ", "\u0327": "c "}


def to_latex(table: Table) -> str:
    def show(cell: Any) -> str:
        ours = rf"\textbf{{{latex(cell.ours)}}}" if cell.best else latex(cell.ours)
        if not cell.thesis:
            return ours
        thesis = rf"\textbf{{{latex(cell.thesis)}}}" if cell.bold else latex(cell.thesis)
        return f"{ours} ({thesis})"

    frame = wide(table, show, latex)
    sentences = [table.title, "In parentheses: the thesis.", *(sentence.replace("`", "") for sentence in table.caption)]
    return frame.style.hide(axis="index").to_latex(
        caption=" ".join(map(latex, sentences)),
        column_format="l" + "c" * len(table.columns),
        position_float="centering",
        hrules=True,
    )


def latex(text: str) -> str:
    """The text in ASCII that LaTeX sets as it reads; `[U+2603]` for a character that is neither a letter nor in LATEX."""
    escaped = "".join(map(_latex, one_line(text).translate(LATEX)))
    # After the end of a row, \\, these two would be read as its options.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped.startswith(("[", "*")) else escaped


def _latex(character: str) -> str:
    if character.isascii():
        return character
    if character in GREEK:
        name = unicodedata.name(character).replace("LAMDA", "LAMBDA").rpartition(" ")[2]
        return rf"$\{name.lower() if character.islower() else name.capitalize()}$"
    base, accent = (*unicodedata.normalize("NFD", character), "")[:2]
    if base.isascii() and accent in ACCENTS:
        return rf"\{ACCENTS[accent]}{{{base}}}"
    return f"[U+{ord(character):04X}]"


def to_text(table: Table) -> str:
    """For the terminal: ours above, the thesis's number below in parentheses; * marks the best of a column."""

    def show(cell: Any) -> str:
        return cell.ours + ("*" if cell.best else "") + (f"\n({cell.thesis})" if cell.thesis else "")

    return rendered("table.txt", table=table, printed=printed(wide(table, show)))


def to_svg(table: Table) -> str:
    """A picture: ours, and dimmed the thesis's number."""

    def show(cell: Any) -> str:
        ours = f"[bold]{cell.ours}[/bold]" if cell.best else cell.ours
        return f"{ours} [dim]{cell.thesis}[/dim]" if cell.thesis else str(ours)

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
