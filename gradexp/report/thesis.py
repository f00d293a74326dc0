"""The numbers that the thesis prints (results/thesis.csv)."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cache

from gradexp.engine.run import ROOT, Config


@dataclass(frozen=True)
class Thesis:
    """A number that the thesis prints, with its standard deviation where it prints one."""

    value: float
    bold: bool
    std: float | None = None

    def __str__(self) -> str:
        return f"{self.value:g}" + ("" if self.std is None else f" ± {self.std:g}")


@cache
def read_thesis() -> dict[tuple[str, ...], Thesis]:
    """{(item, row, column): number}, and {(item, row, column, quantity): number} where a cell has several."""
    with (ROOT / "results" / "thesis.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    found: dict[tuple[str, ...], Thesis] = {}
    for x in lines:
        value = Thesis(float(x["value"]), x["bold"] == "1", float(x["std"]) if x["std"] else None)
        found[x["item"], x["row"], x["column"]] = found[x["item"], x["row"], x["column"], x["metric"]] = value
    return found


def item_of(spec: Config) -> str:
    """What results/thesis.csv calls a table."""
    return str(spec.get("thesis", spec["number"]))


def thesis_of(spec: Config, row: Config, column: Config, quantity: str | None) -> Thesis | None:
    """What the thesis prints in a table's cell."""
    names = [str(one.get("thesis", one["label"])) for one in (row, column)]
    return read_thesis().get((item_of(spec), *names, *([quantity] if quantity else [])))


def thesis_value(spec: Config, row: Config, column: Config, quantity: str | None) -> float:
    """The same as a number; NaN where it prints none."""
    found = thesis_of(spec, row, column, quantity)
    return math.nan if found is None else found.value
