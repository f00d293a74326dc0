"""The DataFrame of all runs: what a user queries, against the files themselves."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest

import gradexp
from gradexp.base.errors import UserError
from gradexp.engine.compose import plan
from gradexp.engine.record import judged
from gradexp.engine.run import ROOT, record_files
from gradexp.report import specs

FILES = record_files(ROOT / "results")


@pytest.fixture(scope="module")
def everything() -> pd.DataFrame:
    return gradexp.records()


def test_every_record_is_a_row(everything: pd.DataFrame) -> None:
    assert everything.index.is_unique
    assert set(everything.index) == {file.stem for file in FILES}
    assert everything.columns.is_unique


@pytest.mark.parametrize("file", FILES[::40], ids=lambda file: file.stem)
def test_a_row_has_what_the_record_has(file: Path, everything: pd.DataFrame) -> None:
    record, row = json.loads(file.read_text()), everything.loc[file.stem]
    for name in ("experiment", "seed", "status"):
        assert row[name] == record[name]
    assert row["commit"] == record["git"]["commit"]
    assert row["task._target_"] == record["config"]["task"]["_target_"]
    numbers = {name: value for name, value in record["metrics"].items() if isinstance(value, int | float)}
    numbers = judged(numbers, record["config"])
    assert row[list(numbers)].to_dict() == pytest.approx(numbers)
    assert {name: row[f"upstream.{name}"] for name in record["upstream"]} == {n: x["id"] for n, x in record["upstream"].items()}


def test_accuracy_on_held_out_images_is_called_that(everything: pd.DataFrame) -> None:
    """Also in records that were written before the name was introduced."""
    held_out = everything["data.validation"].notna()
    assert held_out.any()
    assert everything.loc[held_out, "validation/accuracy"].notna().all()
    assert everything.loc[held_out, "test/accuracy"].isna().all()
    assert everything.loc[~held_out, "validation/accuracy"].isna().all()


def test_a_scale_and_curves_are_asked_for(everything: pd.DataFrame) -> None:
    assert set(gradexp.records(scale="cpu")["scale"]) == {"cpu"}
    assert "train/loss" not in everything
    assert all(isinstance(curve, list) for curve in gradexp.records(curves=True)["train/loss"].dropna())


def test_a_table_by_hand_is_the_rendered_table() -> None:
    """Means, deviations and numbers of seeds of a pivot are those of results/tables."""
    frame = gradexp.records(table="2.1", scale="cpu")
    by_hand = frame[frame["finished"]].groupby(["row", "column"])["value"].agg(["mean", "std", "count"])
    rendered = pd.read_csv(ROOT / "results/tables/cpu/table_2_1.csv", dtype={"column": str}).set_index(["row", "column"])
    filled = rendered[rendered["n"] > 0]
    assert by_hand.loc[filled.index, "mean"].to_numpy() == pytest.approx(filled["ours"].to_numpy(), abs=1e-4)
    assert by_hand.loc[filled.index, "count"].tolist() == filled["n"].tolist()
    np.testing.assert_allclose(by_hand.loc[filled.index, "std"], filled["std"], atol=1e-4)
    printed = frame.groupby(["row", "column"])["thesis"].first()
    np.testing.assert_allclose(printed.loc[filled.index], filled["thesis"])


def test_missing_runs_are_rows_with_their_commands(tmp_path: Path) -> None:
    frame = gradexp.records(table="2.1", scale="quick", results=tmp_path)
    spec = specs.load("table", "2.1")
    assert len(frame) == sum(len(cell.commands) for cell in specs.cells(spec, "quick"))
    assert not frame["finished"].any()
    assert frame["value"].isna().all()
    assert all(command.startswith("python run.py experiment=jacobian_distill scale=quick") for command in frame["command"])
    assert gradexp.records(results=tmp_path).empty


def test_a_figure_has_series_and_points() -> None:
    frame = gradexp.records(figure="3.2b", scale="cpu")
    assert set(frame["column"]) == {"0", "10", "50", "90"}
    assert frame["test/accuracy"].notna().sum() == frame["finished"].sum() > 0


@pytest.mark.parametrize(
    ("kind", "number", "shape"),
    [("figure", "3.3", (6, 1)), ("figure", "5.3", (7, 1)), ("figure", "2.1", (1, 1)), ("table", "5.2", (3, 2))],
)
def test_every_kind_of_table_and_figure_is_a_query(kind: str, number: str, shape: tuple[int, int]) -> None:
    """Galleries, panels, figures without data, cells of two metrics: (runs, metrics of each)."""
    frame = gradexp.records(**{kind: number}, scale="quick")  # type: ignore[arg-type]
    assert (frame["id"].nunique(), len(frame) // frame["id"].nunique()) == shape
    assert frame["thesis"].notna().any() == (kind == "table")


def test_examples_of_the_page_run(tmp_path: Path) -> None:
    """Those of docs/records.md, one after the other, as a user pastes them; and what they print is right."""
    text = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    table, summary = names["table"], names["summary"]
    assert isinstance(table, pd.DataFrame)
    assert isinstance(summary, pd.DataFrame)
    runs = [json.loads(file.read_text()) for file in FILES if file.parent.name == "jacobian_distill"]
    chosen = [
        run["metrics"]["test/accuracy"]
        for run in runs
        if run["id"] in gradexp.records(table="2.1")["id"].tolist()
        and (run["config"]["method"]["name"], run["config"]["data"]["per_class"]) == ("ce", 5)
    ]
    assert summary.loc[("Cross-Entropy (CE)", "5"), "mean"] == pytest.approx(mean(chosen))
    assert summary.loc[("Cross-Entropy (CE)", "5"), "std"] == pytest.approx(stdev(chosen))
    assert table.loc["Cross-Entropy (CE)", "5"] == pytest.approx(mean(chosen))


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"no table 2\.11"):
        gradexp.records(table="2.11")
    with pytest.raises(UserError, match=r"scale=large: 2\.1 has paper, cpu, quick"):
        gradexp.records(table="2.1", scale="large")
    with pytest.raises(UserError, match="scale=large: expected paper, cpu or quick"):
        gradexp.records(scale="large")
    with pytest.raises(UserError, match="there is no such folder; give the one that contains runs/"):
        gradexp.records(results="nowhere")
    with pytest.raises(UserError, match="give one of them"):
        gradexp.records(table="2.1", figure="5.3")


def test_the_package_is_imported_quickly() -> None:
    code = "import sys, gradexp; sys.exit(bool({'torch', 'pandas', 'hydra'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_quick_runs_have_a_folder_that_git_ignores(tmp_path: Path) -> None:
    """It lies inside the folder of results, whose readers look into it."""
    quick, real = (plan(["experiment=teacher", f"scale={scale}"]).record_path for scale in ("quick", "cpu"))
    assert quick.parents[2] == ROOT / "results" / "quick" and real.parents[2] == ROOT / "results"
    assert not subprocess.run(["git", "check-ignore", "-q", str(quick)], cwd=ROOT).returncode
    assert subprocess.run(["git", "check-ignore", "-q", str(real)], cwd=ROOT).returncode == 1
    for folder in ("", "quick"):
        source = next(file for file in FILES if "quick" not in str(file))
        copy = tmp_path / folder / "runs" / source.parent.name / source.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    assert len(gradexp.records(results=tmp_path)) == 2
