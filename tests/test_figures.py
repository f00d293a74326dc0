"""Figures are drawn from records alone."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradexp import runs
from gradexp.errors import UserError
from gradexp.report import figures
from gradexp.report.draw.curves import curves
from gradexp.report.specs import Source

SPEC = {"number": "9.1", "metric": "train/loss", "xlabel": "pass", "ylabel": "loss", "also": ["svg"]}


def series(folder: Path, label: str, *losses: list[float]) -> figures.Series:
    """A series with one record a list."""
    sources = [Source(f"{label}{i}", folder / f"{label}{i}.json", f"python run.py seed={i}") for i in range(len(losses))]
    for source, loss in zip(sources, losses, strict=True):
        runs.write_record(source.record, {"metrics": {"train/loss": loss}})
    return figures.Series({"label": label}, tuple(sources))


def test_curves_are_means_over_seeds_with_a_band(tmp_path: Path) -> None:
    drawn = [series(tmp_path, "a", [4.0, 2.0], [2.0, 2.0]), series(tmp_path, "b", [1.0, 1.0])]
    files = figures.make(SPEC, "quick", drawn, curves, tmp_path / "results")
    assert [file.name for file in files] == [f"figure_9_1.{kind}" for kind in ("png", "pdf", "svg", "csv")]
    assert all(file.stat().st_size > 50 for file in files)
    rows = list(csv.DictReader(files[-1].open()))
    assert [(row["series"], row["x"], float(row["mean"]), float(row["std"])) for row in rows] == [
        ("a", "1", 3.0, 1.0),
        ("a", "2", 2.0, 0.0),
        ("b", "1", 1.0, 0.0),
        ("b", "2", 1.0, 0.0),
    ]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    drawn = [series(tmp_path, "a", [4.0, 2.0])]
    first, second = (figures.make(SPEC, "quick", drawn, curves, tmp_path / name) for name in ("one", "two"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_a_figure_without_its_runs_names_the_commands(tmp_path: Path) -> None:
    absent: Any = figures.Series({"label": "a"}, (Source("x", tmp_path / "x.json", "python run.py seed=7"),))
    with pytest.raises(UserError, match=r"run\.py seed=7"):
        figures.make(SPEC, "quick", [absent], curves, tmp_path)


def test_drawing_needs_no_torch() -> None:
    code = "import sys, gradexp.report.figures, gradexp.report.draw.curves; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
