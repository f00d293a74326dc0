"""The numbers that the thesis prints (results/thesis.csv)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import pandas as pd

from gradexp.engine.run import ROOT, Config


class Thesis(NamedTuple):
    """A number that the thesis prints; std: its standard deviation. NaN where it prints none."""

    value: float = math.nan
    bold: bool = False
    std: float = math.nan

    def __str__(self) -> str:
        """`48.1 ± 0.3`; empty where there is no number."""
        parts = [f"{number:g}" for number in (self.value, self.std) if not math.isnan(number)]
        return " ± ".join(parts)


@cache
def read_thesis() -> dict[tuple[str, ...], Thesis]:
    """{(item, row, column): number}, and {(item, row, column, quantity): number} where a cell has several."""
    lines: Any = pd.read_csv(ROOT / "results" / "thesis.csv", dtype=str, keep_default_na=False).itertuples()
    found: dict[tuple[str, ...], Thesis] = {}
    for x in lines:
        key = (x.item, x.row, x.column)
        found[key] = found[*key, x.metric] = Thesis(float(x.value), x.bold == "1", float(x.std or math.nan))
    return found


def item_of(spec: Config) -> str:
    """The name of a table in results/thesis.csv."""
    return str(spec.get("thesis", spec["number"]))


def thesis_of(spec: Config, row: Config, column: Config, quantity: str | None) -> Thesis:
    """The number that the thesis prints in a table's cell."""
    names = [str(place.get("thesis", place["label"])) for place in (row, column)]
    return read_thesis().get((item_of(spec), *names, *([quantity] if quantity else [])), Thesis())
