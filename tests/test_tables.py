"""Tables against golden files over committed sample records, and by hand."""

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas as pd
import pytest
import yaml
from fakes import at, fake_plan, fake_run

from gradexp.base.errors import UserError
from gradexp.engine.compose import plan
from gradexp.engine.record import write_record
from gradexp.engine.run import ROOT, run_id
from gradexp.report import provenance, records, tables
from gradexp.report import specs as report_specs
from gradexp.report.specs import Thesis, read_thesis

pytestmark = pytest.mark.usefixtures("sample_records")

GOLDEN = ROOT / "tests" / "golden"
SPEC: dict[str, Any] = yaml.safe_load((GOLDEN / "table.yaml").read_text())


def table(results: Path = GOLDEN, scale: str = "cpu") -> tables.Table:
    return tables.build(SPEC, scale, at(results, fake_plan))


@pytest.mark.parametrize(
    ("suffix", "render"),
    [("md", tables.to_markdown), ("csv", tables.to_csv), ("tex", tables.to_latex), ("txt", tables.to_text)],
)
def test_golden(suffix: str, render: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert render(table()) == (GOLDEN / f"table.{suffix}").read_text(encoding="utf-8")


def test_the_picture_shows_both_numbers_and_needs_no_network() -> None:
    picture = tables.to_svg(table())
    assert "10.73" in picture
    assert "8.95" in picture
    assert "font-face" not in picture
    texts = [
        found.attrib | {"text": found.text}
        for found in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    ]
    ours, thesis = ({found["text"]: found for found in texts}[number] for number in ("8.95", "10.73"))
    assert ours["y"] == thesis["y"]
    deviation = next(found for found in texts if found["text"] == "± 0.27 (n=2)")
    assert float(deviation["x"]) + 6 * len(deviation["text"]) < float(thesis["x"]) - 8 * len(thesis["text"])
    assert {found["x"] for found in texts if found["text"] in ("5.22", "8.95")} == {ours["x"]}
    assert '<rect width="100%" height="100%" rx="6" fill="#fff"/>' in picture  # readable on a dark page


def sample(results: Path, overrides: Sequence[str], value: float | None) -> None:
    config = fake_plan(overrides).config
    record = {
        "id": run_id(config),
        "metrics": {"test/accuracy": value},
        "precision": "32",
        "device": "cpu",
        "git": {"commit": "0123456789", "dirty": False},
        "seconds": {"wall": 36.0, "cpu": 36.0},
    }
    write_record(results / "runs" / config["name"] / f"{run_id(config)}.json", record)


def test_mean_deviation_difference_and_best(tmp_path: Path) -> None:
    for method, seed, value in (("ce", 0, 10.0), ("ce", 1, 14.0), ("a", 0, 11.5)):
        sample(
            tmp_path,
            ["experiment=jacobian_distill", "scale=cpu", f"method={method}", "data.per_class=1", f"seed={seed}"],
            value,
        )
    made = table(tmp_path)
    ce, a = numbers(made, "Cross-Entropy (CE)", "1"), numbers(made, "A only", "1")
    assert (ce["ours"], ce["n"]) == (12.0, 2)
    assert ce["std"] == pytest.approx(math.sqrt(8))
    assert ce["difference"] == pytest.approx(12 - 5.69)
    assert math.isnan(a["std"])
    assert (ce["best"], a["best"]) == (True, False)
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(made))))
    assert list(rows[0]) == tables.COLUMNS
    assert len(rows) == 4
    assert rows[0]["run_ids"].count(" ") == 1


def test_cells_are_those_of_the_table() -> None:
    """One row for each seed, in the table's order, with the numbers that its cells are made of."""
    frame = records.cells(SPEC, "cpu", at(GOLDEN, fake_plan))
    made = tables.build(SPEC, "cpu", at(GOLDEN, fake_plan))
    for cell in made.texts.itertuples():
        row, column = cell.Index
        own = frame[(frame["row"] == row) & (frame["column"] == column)]
        assert list(own["run"]) == cell.runs
        assert own["finished"].sum() == cell.n
        assert {f"{number:g}" for number in own["thesis"]} == {cell.thesis}


def numbers(made: tables.Table, row: str, column: str) -> Any:
    """The first metric of a cell."""
    return made.numbers.drop_duplicates(tables.CELL).set_index(tables.CELL).loc[(row, column)]


def test_a_diverged_run_is_nan_and_never_best(tmp_path: Path) -> None:
    for method, value in (("ce", None), ("a", 3.0)):
        sample(tmp_path, ["experiment=jacobian_distill", "scale=cpu", f"method={method}", "data.per_class=1", "seed=0"], value)
    made = table(tmp_path)
    assert made.texts.loc[("Cross-Entropy (CE)", "1"), "ours"] == "NaN (n=1)"
    cell = numbers(made, "Cross-Entropy (CE)", "1")
    assert not cell["best"]
    assert math.isnan(cell["difference"])


def test_seeds_of_which_one_diverged_have_no_deviation(tmp_path: Path) -> None:
    for seed, value in enumerate((None, 3.0)):
        sample(tmp_path, ["experiment=jacobian_distill", "scale=cpu", "method=ce", "data.per_class=1", f"seed={seed}"], value)
    made = table(tmp_path)
    cell = numbers(made, "Cross-Entropy (CE)", "1")
    assert math.isnan(cell["ours"])
    assert math.isnan(cell["std"])
    for render in (tables.to_markdown, tables.to_latex, tables.to_text, tables.to_csv):
        assert "nan" in render(made).lower()


def test_where_cells_depart_differently_both_are_said(tmp_path: Path) -> None:
    made = tables.build(report_specs.load("table", "2.2"), "cpu", at(tmp_path, plan))
    (optimizer,) = [here for key, (here, _) in made.caption.departures.items() if key == "upstream.model.optim.optimizer"]
    assert optimizer == "Adam(lr=0.003) or Adam(lr=0.003, weight_decay=0.001)"


def test_the_oracle_that_table_2_3_asks_for_is_the_one_that_its_rows_use() -> None:
    (command,) = re.findall(r"`python run.py ([^`]*)`", report_specs.load("table", "2.3")["needs"]["paper"])
    row = plan(["experiment=jacobian_transfer", "scale=paper", "method=oracle"])
    assert run_id(plan(command.split()).config) == run_id(row.config["upstream"]["start"])


def test_latex_has_no_letter_that_it_can_not_print(tmp_path: Path) -> None:
    for number in report_specs.numbers("table"):
        spec = report_specs.load("table", number)
        made = tables.build(spec, next(reversed(spec["seeds"])), at(tmp_path, plan))
        assert tables.to_latex(made).isascii(), number


def test_an_empty_cell_says_how_to_fill_itself(tmp_path: Path) -> None:
    made = table(tmp_path)
    command = "python run.py experiment=jacobian_distill scale=cpu method=a data.per_class=5 seed=1"
    for render in (tables.to_markdown, tables.to_text):
        assert command in render(made)


def test_no_scale_borrows_from_another(tmp_path: Path) -> None:
    sample(tmp_path, ["experiment=jacobian_distill", "scale=quick", "method=ce", "data.per_class=1", "seed=0"], 99.0)
    assert not table(tmp_path, "cpu").numbers["n"].any()
    quick = table(tmp_path, "quick")
    assert numbers(quick, "Cross-Entropy (CE)", "1")["ours"] == 99.0
    assert quick.numbers["difference"].isna().all()  # not comparable with the thesis
    with pytest.raises(UserError, match="paper"):
        table(tmp_path, "large")


def test_a_caption_lists_departures_from_the_paper() -> None:
    here = {"scale": {"name": "cpu"}, "upstream": {}, "optim": {"passes": 60}, "seed": 0}
    paper = {"scale": {"name": "paper"}, "upstream": {}, "optim": {"passes": 500}, "seed": 0}
    assert provenance.departed([(here, paper)]) == {"optim.passes": ("60", "500")}
    assert "`optim.passes` 60 (paper: 500)" in " ".join(table(scale="quick").caption.sentences)


HERE = {"precision": "32", "device": "here", "git": {"commit": "c" * 40, "dirty": False}, "seconds": {"wall": 3600}}
ALONE = {"wall": 3600, "upstream": 0}


def test_a_caption_counts_the_uses_of_each_file_of_a_teacher_that_ran_more_than_once() -> None:
    first, second = {"id": "aa", "weights_sha256": "0123456789"}, {"id": "aa", "weights_sha256": "9876543210"}
    records = [{"id": f"run{i}", "upstream": {"teacher": run}, **HERE} for i, run in enumerate((first, first, second))]
    same = provenance.origin_of(records[:2])
    assert same[:2] == (["Computed by 2 runs in 2.0 h, in precision 32 on here, from commit cccccccc (clean)."], [])
    unpacked = {**records[0], "git": {"commit": None, "dirty": False}}
    assert provenance.origin_of([unpacked]).sentences[0].endswith("from commit none (clean).")
    records[2]["seconds"] = ALONE
    second["remade"] = {"test/accuracy": 63.8612}  # as older records have it
    sentences, details, *_ = provenance.origin_of(records)
    files = "2 runs use file 01234567, 1 run uses file 98765432 (test/accuracy 63.8612)"
    assert sentences[1:] == [f"The teacher (run aa) ran more than once: {files}."]
    assert details == ["File 01234567 of run aa: run0, run1.", "File 98765432 of run aa: run2."]
    # All runs may use the second file, while the teacher's record describes the first one.
    (sentence,) = provenance.origin_of(records[2:]).sentences[1:]
    only = "1 run uses file 98765432 (test/accuracy 63.8612)"
    assert sentence == f"The teacher (run aa) ran more than once: {only}."
    origin = "its record, which is of the first training, does not name the file"
    (sentence,) = provenance.origin_of(records[2:], [{"id": "aa", **HERE, "seconds": ALONE}]).sentences[1:]
    assert sentence == f"The teacher (run aa) ran more than once: {only}; {origin}."
    second["remade"] = {}  # nothing was measured
    (sentence,) = provenance.origin_of(records[2:]).sentences[1:]
    assert sentence == "The teacher (run aa) ran more than once: 1 run uses file 98765432."


def test_a_table_says_where_the_models_that_it_looks_at_were_trained(tmp_path: Path) -> None:
    """Two looks at one model, whose training was begun elsewhere with other code, and resumed."""
    here = {"precision": "32", "device": "here", "git": {"commit": "c" * 40, "dirty": False}, "seconds": {"wall": 3600}}
    here["started"] = "2026-01-02T03:04:05+00:00"
    began = {"precision": "bf16", "device": "there", "git": {"commit": "b" * 40, "dirty": True}}
    model = fake_run(12 * "a", tmp_path / "teacher" / "model.json")
    looks = [
        dataclasses.replace(fake_run(name, tmp_path / "noise" / f"{name}.json"), below={"model": model, "explainer": model})
        for name in (12 * "b", 12 * "c")
    ]
    for run in looks:
        upstream = {"model": {"experiment": "teacher", "id": 12 * "a"}}
        write_record(run.record_path, {"id": run.id, "metrics": {}, "upstream": upstream, **here})
    trained = {
        "id": 12 * "a",
        "metrics": {},
        "attempts": [began],
        **here,
        "device": "elsewhere",
        "threads": 2,
        "started": "2026-01-01T00:00:00",
    }
    write_record(model.record_path, trained)
    records, below = provenance.records_of([*looks, *looks, fake_run("z", tmp_path / "noise" / "missing.json")])
    assert [record["id"] for record in (*records, *below)] == [12 * "b", 12 * "c", 12 * "a"]
    sentences, details, *_ = provenance.origin_of(records, below)
    where = "in 3 combinations of precision, processor and threads"
    assert sentences == [f"Computed by 2 runs and 1 upstream run in 3.0 h, {where}, from 2 commits (1 of them dirty)."]
    assert details == [
        "Hardware: 32 on elsewhere, 2 threads; 32 on here; bf16 on there.",
        "Commits: bbbbbbbb (dirty), cccccccc.",
    ]


def test_hours_of_a_model_that_was_trained_inside_a_run_count_once(tmp_path: Path) -> None:
    """As older records have it; newer ones say apart what they waited for."""
    place = {"precision": "32", "device": "here", "git": {"commit": "c" * 40, "dirty": False}, "metrics": {}}
    model = {"id": "aa", "started": "2026-01-01T02", "seconds": {"wall": 7200.0}, **place}
    look = {"id": "bb", "started": "2026-01-01T01", "upstream": {"model": {"id": "aa"}}, **place}
    for began, extra, hours in (("01", {}, 3.0), ("05", {}, 5.0), ("01", {"upstream": 7200.0}, 5.0)):
        record = look | {"started": f"2026-01-01T{began}", "seconds": {"wall": 10800.0, **extra}}
        assert f"in {hours} h," in provenance.origin_of([record], [model]).sentences[0]


def summary(values: dict[tuple[str, str], tuple[float, ...]], *, thesis: Thesis | None = None, **changes: Any) -> pd.DataFrame:
    """The summary of cells with these numbers, one a metric, of one run each; NaN for a cell without a finished run."""
    printed = thesis or Thesis()
    rows = [
        {"row": row, "column": column, "part": part, "metric": f"m{part}", "run": fake_run("a", Path("a.json"))}
        | {"finished": value == value, "value": value, "spread": math.nan}
        | {"thesis": printed.value, "thesis_std": printed.std, "thesis_bold": printed.bold}
        for (row, column), found in values.items()
        for part, value in enumerate(found)
    ]
    spec = {"rows": [], "columns": [], "comparable": ["cpu"], "best": "max", **changes}
    return tables.summary(pd.DataFrame(rows), spec, "cpu")


def test_a_cell_may_show_the_spread_inside_its_runs() -> None:
    """Root mean square of the runs' own standard deviations, not the one between runs."""
    cells = records.cells(SPEC, "cpu", at(GOLDEN, fake_plan)).head(2).assign(value=[1.0, 2.0], spread=[3.0, 4.0])
    assert tables.summary(cells, SPEC, "cpu")["std"].tolist() == [pytest.approx(12.5**0.5)]


@pytest.mark.parametrize(
    ("best", "per", "expected"),
    [("min", "row", {1.0, 0.0}), ("max", "column", {2.0, 3.0}), ("max", "table", {3.0}), (None, "row", set())],
)
def test_bold_is_per_column_or_per_row(best: str | None, per: str, expected: set[float]) -> None:
    grid = {("a", "x"): (1.0,), ("a", "y"): (3.0,), ("b", "x"): (2.0,), ("b", "y"): (0.0,)}
    made = summary(grid, best=best, best_per=per)
    assert set(made[made["best"]]["ours"]) == expected


def test_a_column_may_have_a_best_of_its_own() -> None:
    grid = {
        ("a", "x"): (1.0,),
        ("a", "y"): (3.0,),
        ("b", "x"): (2.0,),
        ("b", "y"): (0.0,),
        ("a", "z"): (5.0,),
        ("b", "z"): (6.0,),
    }
    made = summary(grid, columns=[{"label": "y", "best": "min"}, {"label": "z", "best": None}])
    assert set(made[made["best"]]["ours"]) == {2.0, 0.0}
    columns = [{**SPEC["columns"][0], "best": "min"}, *SPEC["columns"][1:]]
    assert table_with(columns=columns).best_per == "column"


def test_a_row_apart_does_not_compete() -> None:
    grid = {("a", "x"): (1.0,), ("b", "x"): (2.0,), ("oracle", "x"): (9.0,)}
    assert summary(grid, rows=[{"label": "oracle", "apart": True}])["best"].tolist() == [False, True, False]
    rows = [{**row, "apart": row["label"] == "A only"} for row in SPEC["rows"]]
    assert "The best number is marked among the rows without A only." in table_with(rows=rows).caption.sentences
    assert not any("among the rows" in sentence for sentence in table().caption.sentences)


def test_one_filled_cell_is_not_the_best_of_its_column() -> None:
    assert not summary({("a", "x"): (1.0,), ("b", "x"): (math.nan,)})["best"].any()


def test_departures_that_a_note_describes_are_not_listed() -> None:
    (sentence,) = [
        x for x in table_with(described=["optim."], notes={"quick": "12 passes."}).caption.sentences if "departs" in x
    ]
    assert sentence == "Scale quick departs from scale=paper in: the settings described above."
    assert "12 passes." in table_with(notes={"quick": "12 passes.", "cpu": "More."}).caption.sentences
    assert "More." not in table_with(notes={"cpu": "More."}).caption.sentences
    assert table_with(title="On {data}, {where}", where={"quick": "here"}).title == "On toy, here"


def test_the_data_that_runs_need_are_named_until_a_cell_has_been_run() -> None:
    """A cell that has been run shows that they are there, though others are empty."""
    spec = SPEC | {"needs": dict.fromkeys(("quick", "cpu"), "photographs")}
    empty, begun = (tables.build(spec, scale, at(GOLDEN, fake_plan)) for scale in ("quick", "cpu"))
    assert "Its empty cells need photographs." in empty.caption.sentences
    assert begun.missing and not any("photographs" in sentence for sentence in begun.caption.sentences)


def table_with(**changes: Any) -> tables.Table:
    return tables.build({**SPEC, **changes}, "quick", at(GOLDEN, fake_plan))


@pytest.mark.parametrize(("wrong", "right"), [("nots", "notes"), ("rows: [{labl: a}]\ntitle", "label")])
def test_a_misspelt_key_of_a_table_is_an_error(wrong: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_specs, "ROOT", tmp_path)
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "9.yaml").write_text(f"{wrong}: x\n")
    with pytest.raises(UserError, match=f"there is no key .*, did you mean {right}"):
        report_specs.load("table", "9")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("", "title is missing"), ("title: x\nrows: [", "not YAML"), ("number: 3", "number")),
        ("like: 8\nseeds: {quik: [0]}\n", "table 9: seeds has quik, which is no scale, did you mean quick"),
        ("like: 8\ncomparable: [papr]\n", "table 9: comparable has papr, which is no scale"),
        ("like: 8\nrows: [{label: a, thesis: null, overrides: [scale=cpu]}]\n", "table 9: scale=cpu is no override"),
        ("like: 8\ncolumns: [{label: a, thesis: null, overrides: [seed=1]}]\n", "table 9: seed=1 is no override"),
        ("like: 8\nrows: [{label: a, thesis: CEE, overrides: []}]\n", "thesis: CEE: .* no such row of 2.1, did you mean CE"),
        ('like: 8\ncolumns: [{label: a, thesis: "51", overrides: []}]\n', "thesis: 51: .* no such column of 2.1"),
    ],
)
def test_a_table_that_is_no_table_is_an_error(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_specs.read_thesis()  # which is kept
    monkeypatch.setattr(report_specs, "ROOT", tmp_path)
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "8.yaml").write_text((GOLDEN / "table.yaml").read_text())
    (tmp_path / "conf" / "table" / "9.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        report_specs.load("table", "9")


def test_a_table_may_be_like_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_specs, "ROOT", tmp_path)
    folder = tmp_path / "conf" / "table"
    folder.mkdir(parents=True)
    (folder / "1.yaml").write_text((GOLDEN / "table.yaml").read_text())
    (folder / "2.yaml").write_text("like: 1\ncorner: another\n")
    first, second = (report_specs.load("table", number) for number in ("1", "2"))
    assert second == {**first, "number": second["number"], "corner": "another"}
    (folder / "1.yaml").write_text("like: 2\n")
    with pytest.raises(UserError, match="no table 2"):
        report_specs.load("table", "2")


def test_a_misspelt_metric_is_an_error_and_no_diverged_run() -> None:
    with pytest.raises(UserError, match="has no metric test/acuracy, did you mean test/accuracy"):
        tables.build({**SPEC, "metric": "test/acuracy"}, "cpu", at(GOLDEN, fake_plan))


def test_a_column_that_paper_does_not_have_is_set_against_its_first() -> None:
    made = tables.build(report_specs.load("table", "4.1-size"), "cpu", at(GOLDEN, plan))
    assert made.caption.departures["data.per_class"] == ("5", "50")
    assert not any("for orientation" in sentence for sentence in made.caption.sentences)  # it has no number of the thesis


def test_a_table_of_held_out_images_says_that_the_test_set_is_not_read() -> None:
    made = tables.build(report_specs.load("table", "4.3-grid"), "cpu", at(GOLDEN, plan))
    assert "Seeds: 0. Held-out training images replace the test set, after the last step." in made.caption.sentences
    assert made.numbers["thesis"].isna().all()


def test_the_thesiss_numbers_stand_beside_ours_only_where_both_can_be_compared() -> None:
    def teacher(scale: str) -> str:
        return next(sentence for sentence in table(scale=scale).caption.sentences if sentence.startswith("Teacher"))

    assert "the thesis's 64.78" in teacher("cpu")
    assert "thesis" not in teacher("quick")


def specs() -> list[Path]:
    return sorted((ROOT / "conf" / "table").glob("*.yaml"))


@pytest.mark.parametrize("path", specs(), ids=lambda path: path.stem)
def test_every_cell_composes_and_has_its_number_in_the_thesis(path: Path) -> None:
    spec = report_specs.load("table", path.stem)
    thesis = read_thesis()
    shown = []
    for row, column, seeds in report_specs.cells(spec, "paper" if "paper" in spec["seeds"] else "cpu"):
        item = spec.get("thesis", spec["number"])
        name, heading = (place.get("thesis", place["label"]) for place in (row, column))
        if heading is None:  # a quantity that the thesis prints no numbers of
            assert name is None or (item, name) in {key[:2] for key in thesis}
        elif name is not None:  # a row that it does not have
            assert (item, name, heading) in thesis
        metric = next(place["metric"] for place in (row, column, spec) if "metric" in place)
        shown += [(run_id(plan(overrides).config), str(metric)) for overrides in list(seeds.values())[:1]]
    assert len(set(shown)) == len(shown), "two cells show the same number"


def test_a_column_may_have_seeds_of_its_own() -> None:
    first, *others = SPEC["columns"]
    spec = {**SPEC, "columns": [{**first, "seeds": {"cpu": [7]}}, *others], "seeds": {"cpu": [0, 1]}}
    for _, column, runs in report_specs.cells(spec, "cpu"):
        assert list(runs) == ([7] if column["label"] == first["label"] else [0, 1])
        assert [words[-1] for words in runs.values()] == [f"seed={seed}" for seed in runs]
    made = tables.build(spec, "cpu", at(GOLDEN, fake_plan))
    assert (
        f"Seeds: 0, 1 (column {first['label']}: 7). The test set is evaluated once, after the last step."
        in made.caption.sentences
    )


def printed_in_the_thesis(item: str) -> set[tuple[str, str]]:
    with (ROOT / "results" / "thesis.csv").open(newline="") as file:
        return {(line["row"], line["column"]) for line in csv.DictReader(file) if line["item"] == item}


@pytest.mark.parametrize("path", specs(), ids=lambda path: path.stem)
def test_every_number_of_the_thesiss_table_has_its_cell(path: Path) -> None:
    spec = report_specs.load("table", path.stem)
    if "thesis" in spec:
        pytest.skip("not one of the thesis's own tables")
    named = [[place.get("thesis", place["label"]) for place in cell[:2]] for cell in report_specs.cells(spec, "paper")]
    cells = {tuple(map(str, names)) for names in named if None not in names}  # others are not the thesis's
    beside = {tuple(line["thesis"]) for line in spec.get("upstream", [])}
    assert printed_in_the_thesis(spec["number"]) == cells | (beside & printed_in_the_thesis(spec["number"]))


def committed(pattern: str) -> list[Path]:
    """Files under results/ that git tracks: a user's own runs are the user's."""
    listed = subprocess.run(["git", "ls-files", f"results/{pattern}"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_committed_records_are_whole() -> None:
    for file in committed("runs/*.json"):
        record = json.loads(file.read_text())
        assert record["id"] == file.stem
        assert record["experiment"] == file.parent.name
        assert record["git"]["dirty"] is False, f"{file} was made from uncommitted code"
        assert run_id(record["config"]) == file.stem, f"{file} does not describe the run that its name says"


def test_rendered_tables_are_up_to_date() -> None:
    """A committed table is what its committed records give."""
    for file in committed("tables/*.csv"):
        number = file.stem.removeprefix("table_").replace("_", ".")
        spec = report_specs.load("table", number)
        made = tables.build(spec, file.parent.name, plan)
        assert tables.to_csv(made) == file.read_text(), f"make tables SCALE={file.parent.name}"


def test_a_cell_of_two_metrics_shows_both_and_is_judged_by_the_last() -> None:
    grid = {("a", "x"): (70.0, 80.0), ("a", "y"): (90.0, 60.0), ("a", "z"): (math.nan, math.nan)}
    numbers = summary(grid, best_per="table", thesis=Thesis(75.37, bold=True))
    assert numbers["best"].tolist() == [True, True, False, False, False, False]
    runs = [fake_run("a", Path("a.json"))] * len(numbers)
    cells = numbers[[*tables.CELL, "part"]].assign(run=runs, finished=numbers["n"] > 0)
    made = dataclasses.replace(table(), numbers=numbers, cells=cells)
    both, _, empty = made.texts.itertuples()
    assert both.ours == "70.00 / 80.00"
    assert both.thesis == "75.37 / 75.37"
    assert both.gap == "−5.37 / +4.63"
    assert empty.ours == tables.EMPTY
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(made))))
    assert [(line["column"], line["metric"], line["ours"]) for line in lines] == [
        ("x", "m0", "70.0000"),
        ("x", "m1", "80.0000"),
        ("y", "m0", "90.0000"),
        ("y", "m1", "60.0000"),
        ("z", "m0", ""),
        ("z", "m1", ""),
    ]


def test_a_scale_may_run_only_some_cells(tmp_path: Path) -> None:
    spec = SPEC | {"only": {"quick": [["A only", "5"]]}}
    made = tables.build(spec, "quick", at(tmp_path, fake_plan))
    assert [(source.command.split()[4:6]) for source in made.missing] == [["method=a", "data.per_class=5"]]
    assert made.texts.loc["A only", "ours"].tolist() == ["n/a", "–"]
    assert "not part of this scale" in " ".join(made.caption.sentences)


def test_the_thesiss_quantities_are_told_apart() -> None:
    thesis = read_thesis()
    keys = [("5.2", "lambda = 1e-5", "mu = 1e-3", quantity) for quantity in ("test accuracy (%)", "GAN-test (%)")]
    assert [thesis[key].value for key in keys] == [75.37, 85.64]


def test_every_part_of_table_5_2_stands_beside_the_thesis(tmp_path: Path) -> None:
    spec = report_specs.load("table", "5.2")
    made = tables.build(spec, "quick", at(tmp_path, plan))
    assert made.texts.loc[("λ = 1e-5", "μ = 1e-3"), "thesis"] == "75.37 / 85.64"
    assert made.numbers["thesis"].notna().all()
