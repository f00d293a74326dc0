"""docs/gpu_hours.md, and estimates at scale=paper, where nothing was measured."""

import math
from pathlib import Path

import gpu_hours
import operations
import pytest
import reproduce
from common import planner

from gradexp.engine.run import ROOT
from gradexp.report import costs


def test_the_page_is_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rows of one table, which include its teachers, counted again: a stored count may be of earlier code."""
    item, plan = "table 4.2", planner([])
    runs = [plan(words) for words in costs.items("paper")[item]]
    every = {run.id: run for run in costs.needed(runs)}
    kinds = {costs.signature(run.config): run.config for run in every.values()}
    stored = operations.counts(kinds, operations.STORE)
    monkeypatch.setattr(operations, "STORE", tmp_path / "missing.json")
    units = operations.counts(kinds, tmp_path / "again.json")
    assert units == stored
    seconds = {name: gpu_hours.seconds_of(run, units[costs.signature(run.config)]) for name, run in every.items()}
    written = (ROOT / "docs" / "gpu_hours.md").read_text().splitlines()
    expected = gpu_hours.steps({item: runs}, units, seconds)
    rows = [line for line in expected if line.startswith("| ")][1:]
    first = written.index(rows[0])
    assert written[first : first + len(rows)] == rows
    assert written[first + len(rows)].startswith("| table ")  # there are no others
    assert written[: len(gpu_hours.head())] == gpu_hours.head()
    assert any("| teacher " in line for line in expected)


def test_every_kind_of_run_has_an_estimate_at_paper_scale(places: list[str]) -> None:
    """By operation counts, where there is no record; the first run of each table and figure, and its upstream runs."""
    runs = [planner(places)(next(iter(commands))) for commands in costs.items("paper").values() if commands]
    estimates = reproduce.Estimates(reproduce.shared("paper", places), runs)
    unknown = [run.command for run in costs.needed(runs) if math.isinf(estimates.seconds(run.config, 1))]
    assert not unknown
