"""The numbers that the thesis prints (results/thesis.csv)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pandas as pd

from gradexp.base.errors import UserError
from gradexp.engine.run import ROOT, Config

COLUMNS = ["item", "row", "column", "metric", "value", "std", "bold"]


class Thesis(NamedTuple):
    """A number that the thesis prints, and its standard deviation; NaN if it prints none."""

    value: float = math.nan
    bold: bool = False
    std: float = math.nan

    def __str__(self) -> str:
        """`48.1 ± 0.3`; empty without a number."""
        parts = [f"{number:g}" for number in (self.value, self.std) if not math.isnan(number)]
        return " ± ".join(parts)


@cache
def read_thesis() -> dict[tuple[str, ...], Thesis]:
    """The numbers by (item, row, column), and by (item, row, column, quantity) for cells with several.

    Raises UserError where the file is damaged, empty, or has two numbers for one cell.
    """
    file = ROOT / "results" / "thesis.csv"
    numbers: dict[tuple[str, ...], Thesis] = {}
    try:
        lines: Any = pd.read_csv(file, dtype=str, keep_default_na=False)[COLUMNS].itertuples()
        for line in lines:
            key, bold = (line.item, line.row, line.column), line.bold == "1"
            if (*key, line.metric) in numbers:
                raise ValueError(f"{', '.join(key)} has two numbers")
            numbers[key] = numbers[*key, line.metric] = Thesis(float(line.value), bold, float(line.std or math.nan))
        if not numbers:
            raise ValueError("it has no numbers")
    except (OSError, ValueError, KeyError) as error:  # pandas's own errors are ValueErrors
        raise UserError(f"{file} can't be read ({' '.join(str(error).split())}); restore it with git") from None
    return numbers


def item_of(spec: Config) -> str:
    """The name of a table in results/thesis.csv."""
    return str(spec.get("thesis", spec["number"]))


def thesis_of(spec: Config, row: Config, column: Config, quantity: str | None) -> Thesis:
    """The number that the thesis prints in a table's cell; quantity: which one, if the cell has several."""
    names = [str(entry.get("thesis", entry["label"])) for entry in (row, column)]
    return read_thesis().get((item_of(spec), *names, *([quantity] if quantity else [])), Thesis())
