"""Figures are drawn from records alone."""

import csv
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_run
from matplotlib.figure import Figure

from gradexp.base.errors import UserError
from gradexp.engine.build import locate
from gradexp.engine.compose import plan
from gradexp.engine.record import write_arrays, write_record
from gradexp.engine.run import ROOT
from gradexp.report import figures, specs
from gradexp.report.draw.lines import curves, illustration

pytestmark = pytest.mark.usefixtures("sample_records")

SPEC: dict[str, Any] = {
    **{"number": "9.1", "seeds": {"quick": [0, 1]}, "also": ["svg"]},
    **{"metric": "train/loss", "xlabel": "pass", "ylabel": "loss"},
}


def series(folder: Path, label: str, *losses: list[float]) -> figures.Series:
    """A series with one record a list."""
    sources = [fake_run(f"{label}{i}", folder / f"{label}{i}.json", f"seed={i}") for i in range(len(losses))]
    for source, loss in zip(sources, losses, strict=True):
        write_record(source.record_path, {"id": source.id, "status": "finished", "metrics": {"train/loss": loss}})
    return figures.Series({"label": label}, tuple(sources))


def test_curves_are_means_over_seeds_with_a_band(tmp_path: Path) -> None:
    drawn = [series(tmp_path, "a", [4.0, 2.0], [2.0, 2.0]), series(tmp_path, "b", [1.0, 1.0])]
    files = figures.make(SPEC, "quick", drawn, curves, tmp_path / "results")
    assert [file.name for file in files] == [f"figure_9_1.{kind}" for kind in ("png", "pdf", "svg", "csv", "md")]
    assert all(file.stat().st_size > 50 for file in files)
    assert "<!-- scale=quick, seeds 0, 1 -->" in files[2].read_text()  # a copy of the picture alone still says it
    rows = list(csv.DictReader(files[-2].open()))
    assert [(row["series"], row["x"], row["mean"], row["std"]) for row in rows] == [
        ("a", "1", "3", "1.41"),
        ("a", "2", "2", "0"),
        ("b", "1", "1", ""),
        ("b", "2", "1", ""),
    ]


def test_a_curve_that_ends_early_leaves_a_gap(tmp_path: Path) -> None:
    """As that of a training that diverged."""
    drawn = [series(tmp_path, "a", [4.0, 2.0], [2.0])]
    files = figures.make(SPEC, "quick", drawn, curves, tmp_path / "results")
    points = list(csv.DictReader(files[-2].open()))
    assert [row["mean"] for row in points] == ["3", "nan"]
    assert [row["std"] for row in points] == ["1.41", "nan"]  # no 0, which would say that the seeds agree


def test_a_curve_that_one_run_has_not_is_a_gap_and_a_misspelt_one_an_error(tmp_path: Path) -> None:
    one = series(tmp_path, "a", [4.0, 2.0], [2.0, 4.0])
    record = {"id": "a0", "status": "diverged", "metrics": {"accuracy": None}}
    write_record(one.runs[0].record_path, record)
    np.testing.assert_array_equal(one.metric("train/loss"), [[np.nan, np.nan], [2, 4]])
    with pytest.raises(UserError, match="did you mean train/loss"):
        one.metric("train/los")
    write_record(one.runs[1].record_path, {"id": "a1", "status": "finished", "metrics": {"train/loss": 1.0}})
    with pytest.raises(UserError, match="expected a curve, but train/loss is a number"):
        one.band("train/loss")


def test_the_thesiss_numbers_are_drawn_only_where_they_can_be_compared(tmp_path: Path) -> None:
    seen = []

    def draw(spec: dict[str, Any], series: Any) -> Any:
        seen.append(spec.get("thesis"))
        return curves(spec, series)

    for comparable in (["paper"], ["paper", "quick"]):
        spec = SPEC | {"thesis": "fig 9", "comparable": comparable}
        figures.make(spec, "quick", [series(tmp_path, "a", [1.0])], draw, tmp_path)
    assert seen == [None, "fig 9"]


def test_a_line_of_the_thesis_is_drawn_where_it_can_be_compared(tmp_path: Path) -> None:
    drawn = [series(tmp_path, "a", [4.0, 2.0])]
    spec = SPEC | {"lines": [{"y": 3, "label": "the thesis"}], "comparable": ["paper"]}
    figure, rows = curves(spec, drawn)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "the thesis"]
    assert list(figure.axes[0].lines[1].get_ydata()) == [3, 3]
    assert [row["series"] for row in rows] == ["a", "a"]  # it is no result of ours
    for scale, there in (("paper", True), ("quick", False)):
        spec["seeds"] = {scale: [0]}
        files = figures.make(spec, scale, drawn, curves, tmp_path / "results")
        assert ("<!-- the thesis -->" in files[2].read_text()) == there


def test_the_note_below_a_picture_is_as_wide_as_it(tmp_path: Path) -> None:
    def draw(columns: int) -> figures.Draw:
        return lambda spec, series: (Figure(figsize=(columns * figures.COLUMN_WIDTH, 2)), [{"x": 1}])

    lines = []
    for columns in (1, 2):
        files = figures.make(SPEC | {"note": "word " * 60}, "quick", [], draw(columns), tmp_path)
        lines.append(re.findall(r"<!-- (word .*?) -->", files[2].read_text()))
    assert [len(found) for found in lines] == [5, 3]
    assert [max(map(len, found)) for found in lines] == [64, 134]


def test_a_figure_says_how_its_runs_depart_and_where_they_come_from(tmp_path: Path) -> None:
    spec = SPEC | {
        "title": "Losses.",
        "note": "Of students.",
        "experiment": "jacobian_distill",
        "seeds": {"paper": [0, 1], "quick": [3]},
        "overrides_at": {"paper": ["data.per_class=50"], "quick": ["data.per_class=5"]},
        "series": [{"label": "CE", "overrides": ["method=ce"]}, {"label": "A", "overrides": ["method=a"]}],
    }
    planner = partial(plan, extra=[f"paths.results={tmp_path / 'results'}"])
    first = figures.gather(spec, "quick", planner)[0]
    place = {"precision": "32", "device": "here", "git": {"commit": "c" * 40, "dirty": False}, "seconds": {"wall": 100}}
    write_record(first.runs[0].record_path, {"metrics": {"train/loss": [2.0, 1.0]}, **place})
    caption = figures.caption(spec, "quick", figures.gather(spec, "quick", planner), planner)
    note, departed, seeds, origin = caption.sentences
    assert (note, seeds) == ("Of students.", "Seeds: 3.")
    assert departed == "Scale quick departs from scale=paper in 11 settings, which its .md file lists."
    listed = caption.details[0]
    assert listed.startswith("Departures from scale=paper: `") and listed.count("(paper: ") == 11
    assert "`data.per_class` 5 (paper: 50)" in listed and "`data.name` digits (paper: cifar100)" in listed
    assert origin == "Computed by 1 run in 2 min, in precision 32 on here, from commit cccccccc (clean)."
    own = {**spec, "seeds": {"quick": [3]}}  # a figure of the user's own need not have scale=paper
    assert figures.caption(own, "quick", figures.gather(own, "quick", planner), planner).sentences[1] == departed
    files = figures.make(spec, "quick", [first], curves, tmp_path / "results", caption)
    page = files[-1].read_text()
    assert page.startswith(
        "**Figure 9.1, scale=quick.** Losses.\n\n![Figure 9.1 at scale=quick](figure_9_1.png)\n\n- Of students."
    )
    (link,) = [line for line in page.splitlines() if line.startswith("| CE |")]
    record = first.runs[0].record_path
    assert link == f"| CE | [{record.stem}](../../runs/jacobian_distill/{record.name}) |"
    assert (files[-1].parent / "../../runs/jacobian_distill" / record.name).exists()


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    drawn = [series(tmp_path, "a", [4.0, 2.0])]
    first, second = (figures.make(SPEC, "quick", drawn, curves, tmp_path / name) for name in ("one", "two"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_a_figure_is_drawn_again_only_when_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawings = []

    def noted(*given: Any) -> Any:
        drawings.append(given)
        return curves(*given)

    def files(spec: dict[str, Any], *losses: float, lines: tuple[str, ...] = ()) -> list[Path]:
        made, text = series(tmp_path, "a", list(losses)), figures.provenance.Caption(list(lines), [])
        return figures.make_once(spec, "quick", [made], noted, tmp_path / "results", text, cache=tmp_path / "cache")

    first, other = files(SPEC, 4.0, 2.0), SPEC | {"ylabel": "another"}
    assert files(SPEC, 4.0, 2.0) == first and len(drawings) == 1
    files(SPEC, 4.0, 1.0)
    assert len(drawings) == 2  # another record
    files(other, 4.0, 1.0)
    assert len(drawings) == 3  # another spec
    files(other, 4.0, 1.0, lines=("a line",))
    assert len(drawings) == 4  # another caption
    first[0].write_bytes(b"damaged")
    files(other, 4.0, 1.0, lines=("a line",))
    assert len(drawings) == 5 and first[0].stat().st_size > 50
    monkeypatch.setattr(figures, "_sources", lambda: [first[0]])
    files(other, 4.0, 1.0, lines=("a line",))
    assert len(drawings) == 6  # other code


@pytest.mark.parametrize(
    "text",
    [
        "titel: x",
        "series: [{lable: a}]",
        "series: [{label: a}]\npoints: [{scale: cpu}]",
        "lines: [{y: 1, lable: a}]",
        "series: [{label: a, points: [{scale: cpu}]}]",
    ],
)
def test_a_misspelt_key_of_a_figure_is_an_error(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    (tmp_path / "conf" / "figure").mkdir(parents=True)
    (tmp_path / "conf" / "figure" / "9.yaml").write_text(text)
    with pytest.raises(UserError, match=r"there is no key (titel|lable|scale).*, did you mean (title|label|scales)"):
        specs.load("figure", "9")


def test_a_figure_may_be_drawn_without_series_that_are_not_run_and_says_which(tmp_path: Path) -> None:
    first, last = (series(tmp_path, label, [2.0, 1.0]) for label in ("a, b", "d"))
    absent: Any = figures.Series({"label": "c"}, (fake_run("x", tmp_path / "x.json", "seed=7"), *first.runs))
    partial = SPEC | {"partial": True}
    files = figures.make(partial, "quick", [first, absent, last], curves, tmp_path)
    assert {row["series"] for row in csv.DictReader(files[-2].open())} == {"a, b", "d"}
    assert "seeds 0, 1; not run yet: c -->" in files[2].read_text()
    with pytest.raises(UserError, match="runs are missing"):  # the first series is what others are compared with
        figures.make(partial, "quick", [absent, first], curves, tmp_path)
    with pytest.raises(UserError, match="runs are missing"):
        figures.make(SPEC, "quick", [first, absent], curves, tmp_path)


def test_a_figure_without_its_runs_names_the_commands(tmp_path: Path) -> None:
    absent: Any = figures.Series({"label": "a"}, (fake_run("x", tmp_path / "x.json", "seed=7"),))
    with pytest.raises(UserError, match=r"run\.py seed=7"):
        figures.make(SPEC, "quick", [absent], curves, tmp_path)
    with pytest.raises(UserError, match=r"runs are missing \(they need photographs\); run"):
        figures.make(SPEC | {"needs": {"quick": "photographs"}}, "quick", [absent], curves, tmp_path)


def test_drawing_needs_no_torch() -> None:
    code = "import sys, gradexp.report.figures, gradexp.report.draw.lines; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_without_data_can_be_planned() -> None:
    """Figure 2.1's, at a scale that does not bring a data set along."""
    assert "data" not in plan(["experiment=jacobian_illustration", "scale=cpu"]).config


def test_figure_2_1_shows_every_curve_once_and_its_note(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 5, dtype=np.float32)
    arrays = dict.fromkeys(("x", "teacher", "activations", "noise", "jacobian", "points", "values", "slopes"), x)
    source = fake_run("a", tmp_path / "a.json")
    facts = write_arrays(source.record_path.with_suffix(".npz"), arrays)
    write_record(source.record_path, {"metrics": {}, "arrays": facts})
    drawn = [figures.Series({"label": "fits"}, (source,))]
    figure, rows = illustration({}, drawn)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == len(set(labels)) == 6
    assert [row["jacobian"] for row in rows] == ["-1.00000", "-0.50000", "0.00000", "0.50000", "1.00000"]
    spec = {**specs.load("figure", "2.1"), "also": ["svg"]}
    files = figures.make(spec, "quick", drawn, illustration, tmp_path / "results")
    assert "not evidence" in files[2].read_text()  # the note names what was changed after looking


def test_rendered_figures_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers and the page of a committed figure are what its committed records give."""
    monkeypatch.setattr(figures, "_saved", lambda figure, kind: b"")
    committed = sorted((ROOT / "results" / "figures").glob("*/*.csv"))
    for file in committed:
        scale, number = file.parent.name, file.stem.removeprefix("figure_").replace("_", ".")
        spec = specs.load("figure", number)
        gathered = figures.gather(spec, scale, plan)
        text = figures.caption(spec, scale, gathered, plan)
        made = figures.make(spec, scale, gathered, locate(spec["draw"], "draw"), tmp_path, text)
        for copy in made[-2:]:
            assert copy.read_text() == file.with_suffix(copy.suffix).read_text(), f"make figures SCALE={scale}: {copy.name}"
    assert committed
