"""Files of the report, written whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradexp.base.files import write_atomically


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Raises ValueError for a row with a key that is no column; one that it lacks stays empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_beside(stem: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes {kind: content} as stem.kind. A stem may have dots in it."""
    files = {stem.parent / f"{stem.name}.{kind}": content for kind, content in contents.items()}
    for file, content in files.items():
        write_atomically(file, content if isinstance(content, bytes) else content.encode())
    return list(files)
