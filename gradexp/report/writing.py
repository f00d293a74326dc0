"""Text that is safe to write, whatever labels and captions contain; Markdown and files of the report."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import rich.box
import rich.console
import rich.table

from gradexp.base.files import write_atomically

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*(e[+-]?\d+)?|nan|inf)")
SIGNED_WORDS = re.compile(r"[+-] [\w ,.-]*")  # such as `+ Score-Matching`, which calls nothing


def one_line(text: str) -> str:
    """The text with a space for every line break and control character."""
    return CONTROL.sub(" ", text)


def plain(text: str) -> str:
    """The text for Markdown, on one line, with HTML escaped; `code` and other marks of Markdown remain."""
    parts = re.split(r"(`[^`]*`)", one_line(text))
    return "".join(part if number % 2 else _without_html(part) for number, part in enumerate(parts))


def _without_html(text: str) -> str:
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def csv(frame: pd.DataFrame) -> str:
    """A CSV file without index, whose text no spreadsheet takes for a formula; numbers are not changed."""
    return frame.rename(columns=_no_formula).map(_no_formula).to_csv(index=False)


def _no_formula(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = one_line(cell)
    formula = text.lstrip().startswith(("=", "+", "-", "@")) and not (NUMBER.fullmatch(text) or SIGNED_WORDS.fullmatch(text))
    return f"'{text}" if formula else text


def markdown(frame: pd.DataFrame) -> list[str]:
    """The lines of a table. Cells are not padded to one width, so that a changed cell changes one line of a committed file."""
    lines: list[list[Any]] = [list(frame.columns), *frame.to_numpy().tolist()]
    head, *rows = (f"| {' | '.join(_cell(str(cell)) for cell in line)} |" for line in lines)
    return [head, "|---" * frame.shape[1] + "|", *rows]


def _cell(text: str) -> str:
    """The text on one line, with `|` escaped, and with it the backslashes before it."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(text))


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines that a click on `summary` opens."""
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>"]


def printed(frame: pd.DataFrame) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    screen = io.StringIO()
    # Wide enough that no cell is broken; without colours, also if the environment asks for them.
    options: Any = {"markup": False, "emoji": False, "force_terminal": False}
    rich.console.Console(width=1000, file=screen, **options).print(grid(frame))
    return "".join(f"{line.rstrip()}\n" for line in screen.getvalue().splitlines())


def grid(frame: pd.DataFrame) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.HORIZONTALS)
    for number, name in enumerate(frame.columns):
        table.add_column(name, justify="right" if number else "left")
    for line in frame.itertuples(index=False):
        table.add_row(*line)
    return table


def write_beside(stem: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write {suffix: content} as stem.suffix. The stem's name may contain dots."""
    files = {stem.parent / f"{stem.name}.{kind}": content for kind, content in contents.items()}
    for file, content in files.items():
        write_atomically(file, content if isinstance(content, bytes) else content.encode())
    return list(files)
