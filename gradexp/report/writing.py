"""Markdown and files of the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import rich.box
import rich.console
import rich.table

from gradexp.base.files import write_atomically


def markdown(frame: pd.DataFrame) -> list[str]:
    """The lines of a table. Cells are not padded to one width, so that a changed cell changes one line of a committed file."""
    lines: list[list[Any]] = [list(frame.columns), *frame.to_numpy().tolist()]
    head, *rows = (f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return [head, "|---" * frame.shape[1] + "|", *rows]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Lines that a click on `summary` opens."""
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>"]


def printed(frame: pd.DataFrame) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    screen = io.StringIO()
    # Wide enough that no cell is broken; without colours, also if the environment asks for them.
    rich.console.Console(width=1000, markup=False, force_terminal=False, file=screen).print(grid(frame))
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
