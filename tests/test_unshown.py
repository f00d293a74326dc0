"""Records that no table or figure shows: which they are, what they are compared with, and how a page tells of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import at, fake_plan
from test_report import whole
from test_tables import SPEC

from gradexp.engine.record import write_record
from gradexp.engine.run import Run
from gradexp.report import specs, unshown
from gradexp.report.unshown import Unshown

pytestmark = pytest.mark.usefixtures("sample_records")

ROW = ["experiment=jacobian_distill", "scale=cpu", "method=ce", "data.per_class=1"]
TEACHER = ["experiment=teacher", "scale=cpu"]


def planner(overrides: Sequence[str]) -> Run:
    return replace(fake_plan(overrides), below={"teacher": fake_plan(TEACHER)})


def find(folder: Path, *records: tuple[Sequence[str], dict[str, Any]]) -> list[Unshown]:
    """What is not shown of these records, (overrides, further facts), at a scale with the one table SPEC."""
    for words, facts in records:
        record = whole("cpu", 0, words) | {"config": fake_plan(words).config} | facts
        write_record(folder / "runs" / record["experiment"] / f"{record['id']}.json", record)
    return unshown.find("cpu", at(folder, planner), folder)


@pytest.fixture(autouse=True)
def _one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "every", lambda scale: {"table 2.1": SPEC} if scale == "cpu" else {})


def test_runs_of_cells_and_of_what_they_stand_on_are_shown(tmp_path: Path) -> None:
    """A record of another scale is not this scale's."""
    other = [*ROW[:1], "scale=quick", *ROW[2:], "seed=7"], {"scale": "quick"}
    assert not find(tmp_path, ([*ROW, "seed=0"], {}), (TEACHER, {}), other)


def test_a_teacher_whose_students_are_missing_is_shown_where_a_caption_quotes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not find(tmp_path, (TEACHER, {}))
    quoted_by_none = {key: value for key, value in SPEC.items() if key != "upstream"}
    monkeypatch.setattr(specs, "every", lambda scale: {"table 2.1": quoted_by_none})
    (found,) = find(tmp_path, (TEACHER, {}))
    assert found.nearest.startswith("upstream of table 2.1, ")
    assert found.departures == "nothing: the run that uses it is missing"


def test_a_record_is_compared_with_the_nearest_planned_run(tmp_path: Path) -> None:
    (found,) = find(tmp_path, ([*ROW, "seed=7"], {}))
    assert found.nearest == "table 2.1, Cross-Entropy (CE), 1"
    assert found.differences == {"settings.seed": ("7", "0")}
    assert found.departures == "`settings.seed` 7 (there 0)"


def test_a_class_is_a_difference_and_the_order_of_settings_is_none(tmp_path: Path) -> None:
    config = fake_plan([*ROW, "seed=0"]).config
    ordered = {"_target_": "a.one_cycle", "_partial_": True, "warmup": 0.3, "end": 0.1}
    here, there = ({**config, "optim": {"schedule": dict(items)}} for items in (sorted(ordered.items()), ordered.items()))
    record = whole("cpu", 0, ROW) | {"config": here | {"saliency": {"_target_": "a.GradCAM"}}}
    found = unshown._compared(
        record, [("jacobian_distill", "x", unshown._sorted(there | {"saliency": {"_target_": "a.Random"}}))]
    )
    assert found.differences == {"saliency._target_": ("a.GradCAM", "a.Random")}


def test_an_experiment_that_is_not_planned_has_no_nearest_run(tmp_path: Path) -> None:
    (found,) = find(tmp_path, (["experiment=mine", "scale=cpu"], {}))
    assert (found.nearest, found.departures) == ("", "")


@pytest.mark.parametrize(
    ("objective", "numbers"),
    [("b", "b 2"), ("test/accuracy", "a NaN; b 2; c 3; d 4; e 5; and 1 more"), (None, "a NaN; b 2; c 3; d 4; e 5; and 1 more")],
)
def test_the_objective_is_the_number_or_the_first_ones_are(objective: str | None, numbers: str) -> None:
    """Spreads, intervals and curves are left out."""
    metrics = {
        "a": None,
        "a/std": 1.0,
        "b": 2.0,
        "b/low": 1.0,
        "b/high": 3.0,
        "c": 3.0,
        "curve": [1.0],
        "d": 4.0,
        "e": 5,
        "f": 6,
    }
    record = whole("cpu", 0, ROW, metrics=metrics) | {"config": {"objective": objective}}
    assert Unshown(record, "", {}).numbers == numbers


def test_long_settings_are_shown_from_where_they_differ() -> None:
    same = ", ".join(["64"] * 30)
    found = Unshown(whole("cpu", 0, ROW), "x", {"layers": (f"[{same}, 'M']", f"[{same}]"), "name": ("a b", "a c")})
    assert found.departures == "`layers` … 64, 'M'] (there … 64]); `name` a b (there a c)"


def test_many_differences_are_counted() -> None:
    found = Unshown(whole("cpu", 0, ROW), "x", {f"key{i}": ("1", "2") for i in range(7)})
    assert found.departures.endswith("`key3` 1 (there 2); and 3 more")
