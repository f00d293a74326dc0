"""Data sets as parquet files in the layout of the Hugging Face Hub: a column of encoded images and one of labels."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradexp.base.errors import UserError
from gradexp.data import pictures

if TYPE_CHECKING:
    import pyarrow as pa

PART = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?\.parquet")  # what follows the name of the split; newer ones end in a hash
PACK = b"gradexp"  # key of the schema's metadata that scripts/pack_data.py writes


@dataclass(frozen=True)
class Layout:
    """What is needed to read and check one data set.

    torchvision: the name in torchvision.datasets, empty for a data set that lies as parquet only.
    images: how many the training and the test split have, None where that is not known. names: of the classes, () where
    they have none.
    """

    name: str
    title: str
    classes: int
    channels: int
    size: int
    image_column: str
    label_column: str
    torchvision: str = ""
    images: tuple[int, int] | None = None
    names: tuple[str, ...] = ()


def parts(folder: Path, split: str) -> list[Path]:
    """The files of a split in order of name. Raises UserError where numbered parts are missing, repeated or of two sets."""
    files = sorted(file for file in folder.glob(f"{split}-*.parquet") if file.is_file())
    numbered = {file.name: match for file in files if (match := PART.fullmatch(file.name.removeprefix(split)))}
    if not numbered:
        return files
    names = ", ".join(file.name for file in files)
    numbers = sorted(int(match[1]) for match in numbered.values())
    totals = {int(match[2]) for match in numbered.values()}
    if len(numbered) < len(files) or len(totals) > 1 or len(set(numbers)) < len(numbers):
        raise UserError(f"{folder} holds {split} more than once: {names}; keep one complete set of files")
    (total,) = totals
    if numbers != list(range(total)):
        raise UserError(f"{folder} holds {names}: expected parts 0 to {total - 1} of {total}; fetch the missing ones")
    return files


def read(layout: Layout, files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """images (N, C, H, W) uint8 and labels (N,) int64 of a split. Raises UserError naming the file and what is wrong in it."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        table = _table(file, layout.image_column, layout.label_column)
        labels += _labels(layout, file, table)
        images += [_pixels(layout, file, *row) for row in enumerate(table[layout.image_column].to_pylist())]
    if not images:
        raise _damaged(files[0], "it holds no image")
    return np.stack(images), np.asarray(labels, dtype=np.int64)


def read_pack(files: Sequence[Path]) -> Any:
    """What scripts/pack_data.py noted in the first file; None where it did not write it."""
    import pyarrow.parquet

    noted = (pyarrow.parquet.read_schema(files[0]).metadata or {}).get(PACK)
    try:
        return noted and json.loads(noted)
    except ValueError:
        raise _damaged(files[0], f"its metadata {PACK.decode()} is not JSON") from None


def _table(file: Path, image_column: str, label_column: str) -> pa.Table:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names
        missing = [name for name in (image_column, label_column) if name not in names]
        if missing:
            raise _damaged(file, f"it has no column {', '.join(missing)}, only {', '.join(names)}")
        table = pyarrow.parquet.read_table(file, columns=[image_column, label_column], partitioning=None)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, str(error).splitlines()[0]) from None
    kind = _value_type(table[image_column])
    if pyarrow.types.is_struct(kind) and "bytes" in (names := [field.name for field in kind]):
        kind = kind.field(names.index("bytes")).type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        expected = "encoded images: binary, or struct<bytes: binary, path: string>"
        raise _damaged(file, f"column {image_column} holds {table[image_column].type}, expected {expected}")
    return table


def _pixels(layout: Layout, file: Path, row: int, value: bytes | dict[str, bytes] | None) -> np.ndarray:
    """An image, (C, H, W) uint8."""
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise _damaged(file, f"row {row} holds no bytes of an image")
    try:
        picture = pictures.decode(io.BytesIO(content))
    except pictures.UnreadableError as error:
        raise _damaged(file, f"row {row} holds no readable image ({error})") from None
    if picture.size != (layout.size, layout.size):
        raise _damaged(file, f"row {row} is {picture.width}x{picture.height} pixels, not {layout.size}x{layout.size}")
    return np.asarray(picture).transpose(2, 0, 1) if layout.channels == 3 else np.asarray(picture.convert("L"))[None]


# --- labels -----------------------------------------------------------------------------------------------


def _labels(layout: Layout, file: Path, table: pa.Table) -> list[int]:
    """Labels from integers, or from text that names the classes or holds their numbers."""
    import pyarrow.types as types

    column = table[layout.label_column]
    kind, values, known = _value_type(column), column.to_pylist(), _numbers(layout)
    if types.is_integer(kind):
        numbers = _order(layout, file, table.schema) or range(layout.classes)
        wrong = [label for label in values if label not in range(layout.classes)]
        expected = f"is outside 0..{layout.classes - 1}"
    elif types.is_string(kind) or types.is_large_string(kind):
        values = [None if label is None else known.get(_normal(label), label) for label in values]
        numbers, wrong = range(layout.classes), [label for label in values if not isinstance(label, int)]
        expected = f"is not a class of {layout.title}"
    else:
        raise _damaged(file, f"column {layout.label_column} holds {column.type}, expected integers or names of classes")
    if wrong:
        raise _damaged(file, f"label {wrong[0]} {expected}")
    return [numbers[label] for label in values]


def _order(layout: Layout, file: Path, schema: pa.Schema) -> list[int] | None:
    """Our label for each of the file's, where its metadata has the names of the classes (ClassLabel); None where it has none.

    Names that are not ours at all are ignored. Raises UserError where only some are, and in another order.
    """
    known, absent = _numbers(layout), -1
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][layout.label_column]["names"]
        labels = [known.get(_normal(name), absent) for name in names]
    except (KeyError, TypeError, ValueError, AttributeError):  # no metadata, or of another kind
        return None
    if sorted(labels) == list(range(layout.classes)):
        return labels
    moved = [name for number, (name, label) in enumerate(zip(names, labels, strict=True)) if label not in (absent, number)]
    if moved:
        raise _damaged(file, f"its class names are not those of {layout.title}, and {moved[0]} is in another position")
    return None


def _numbers(layout: Layout) -> dict[str, int]:
    """The labels by number and, where the classes have names, by name."""
    named = {_normal(name): label for label, name in enumerate(layout.names)}
    return {str(label): label for label in range(layout.classes)} | named


def _normal(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")


def _value_type(column: pa.ChunkedArray) -> Any:
    import pyarrow.types as types

    return column.type.value_type if types.is_dictionary(column.type) else column.type


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} can't be used: {why.rstrip('.')}. Fetch the file again, or delete it to use another source.")
