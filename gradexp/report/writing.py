"""Files of the report, written whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from gradexp.base.files import write_atomically


def markdown(frame: pd.DataFrame) -> list[str]:
    """The lines of a table; its cells are not padded to one width, so that a changed cell changes one line."""
    lines: list[list[Any]] = [list(frame.columns), *frame.to_numpy().tolist()]
    head, *rows = (f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return [head, "|---" * frame.shape[1] + "|", *rows]


def write_beside(stem: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes {kind: content} as stem.kind. A stem may have dots in it."""
    files = {stem.parent / f"{stem.name}.{kind}": content for kind, content in contents.items()}
    for file, content in files.items():
        write_atomically(file, content if isinstance(content, bytes) else content.encode())
    return list(files)
