"""Verdicts on known samples, and conf/claims.yaml against the thesis's own numbers."""

import itertools
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from fakes import at, fake_plan
from test_tables import committed

from gradexp.base.errors import UserError
from gradexp.engine.compose import plan
from gradexp.engine.record import write_record
from gradexp.engine.run import ROOT, run_id
from gradexp.report import claims, specs, unshown
from gradexp.report.claims import Judged
from gradexp.report.comparisons import CellName, Grid, pairs
from gradexp.report.inference import estimate

pytestmark = pytest.mark.usefixtures("sample_records")

FILE = ROOT / "conf" / "claims.yaml"
RNG = np.random.default_rng(0)
WRITTEN, LATER = "2026-12-01T12:00:00Z", "2026-12-01T12:00:01+00:00"


def comparison(differences: list[float] | None, **changes: Any) -> dict[str, Any]:
    found = estimate(differences, confidence=0.95, resamples=500) if differences else None
    numbers = asdict(found) if found else {"n": 0}
    return {"label": "a > b", "in_scale": True, "left_out": "", "runs": [], **numbers, "fresh": numbers["n"], **changes}


Stated = tuple[dict[str, Any], list[dict[str, Any]]]


def claim(*samples: list[float] | None, name: str = "x", **changes: Any) -> Stated:
    return stated(*map(comparison, samples), name=name, **changes)


def stated(*comparisons: dict[str, Any], name: str = "x", section: str = "§2.6", **changes: Any) -> Stated:
    """Rows of a claim and of its comparisons."""
    texts = {"claim": "a is better than b", "because": "", "withheld": "", "withheld_in_part": "", "item": "table 2.1"}
    row = {"id": name, "section": section, "chapter": section[1:].partition(".")[0], "comparable": True, **texts}
    row |= {"unit": "seeds", **changes}
    return row, [{"id": name, **one} for one in comparisons]


def judge(*found: Stated) -> Judged:
    numbers = pd.DataFrame([row for _, comparisons in found for row in comparisons], columns=claims.COLUMNS)
    rows = pd.DataFrame([row for row, _ in found]).set_index("id")
    return claims.judge(Judged(rows, numbers.astype(dict.fromkeys(claims.NUMBERS, float)), 0.95))


def only(judged: Judged) -> Any:
    """The row of the one claim."""
    (row,) = judged.claims.itertuples()
    return row


UP, DOWN, UNSURE = [2.0, 2.2, 1.9, 2.1], [-2.0, -2.2, -1.9, -2.1], [2.0, -1.0, 1.5, 0.5]


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        ([UP, UP], "holds"),
        ([DOWN], "contradicted"),
        ([UP, DOWN], "contradicted in 1 of 2 comparisons"),
        ([DOWN, [-x for x in UNSURE]], "contradicted in 1 of 2 comparisons"),  # the second is against it, not significantly
        ([[1.0], [0.0]], "direction only: mixed"),  # a tie is not in favour
        ([[-1.0], [0.0]], "direction only: mixed"),
        ([DOWN, None], "contradicted in 1 of 2 comparisons"),
        ([UP, UNSURE], "undecided (n = 4)"),
        ([UP[:3], UNSURE], "undecided (n = 4)"),
        ([UP, [2.0]], "direction only: for"),
        ([UP, None], "direction only: for, 1 of 2 run"),
        ([[-3.0], [-1.0]], "direction only: against"),
        ([[3.0], [-1.0]], "direction only: mixed"),
        ([[float("inf"), 1.0], UP], "direction only: for"),
        ([None, None], "not run"),
    ],
)
def test_verdicts(samples: list[list[float] | None], verdict: str) -> None:
    found = only(judge(claim(*samples)))
    assert found.words == verdict
    assert math.isnan(found.p_holm) == verdict.startswith(("direction", "not"))  # no p if nothing is decided


def test_a_comparison_outside_the_scale_is_not_counted() -> None:
    judged = judge(stated(comparison(UP), comparison(None, in_scale=False)))
    assert only(judged).words == "holds where tested (1 of 2 comparisons)"
    assert "1 of 1 agree; 1 not part of this scale" in claims.to_markdown(judged, "cpu")


@pytest.mark.parametrize("withheld", ["", "No."])
def test_a_claim_that_no_run_can_decide_is_not_part_of_the_scale(withheld: str) -> None:
    """Withheld or not: nothing is planned, so that nothing is missing."""
    judged = judge(stated(comparison(None, in_scale=False), withheld=withheld), claim(None, name="y"))
    assert judged.claims["words"].tolist() == ["not part of this scale", "not run"]
    assert claims.tally(judged.claims["verdict"]) == "2 claims: 1 not part of this scale, 1 not run."


def test_a_withheld_claim_waits_for_no_run() -> None:
    judged = judge(claim(None, name="x", withheld="No."), claim(None, name="y"))
    assert judged.claims["verdict"].tolist() == ["withheld", "not run"]


def test_a_claim_is_as_sure_as_its_least_sure_comparison() -> None:
    weaker = [2.0, 1.0, 3.0, 2.0]
    assert only(judge(claim(weaker))).p == only(judge(claim(UP, weaker))).p


def test_holm_is_over_a_chapter() -> None:
    """p = .0217: holds alone, and not among three claims; another chapter does not count."""
    first = claim([2.0, 1.0, 3.0, 0.9], name="a")
    alone, family = judge(first).claims, judge(first, claim(UNSURE, name="b"), claim(UNSURE, name="c")).claims
    assert (alone.verdict["a"], family.verdict["a"]) == ("holds", "undecided")
    assert family.p_holm["a"] == pytest.approx(3 * alone.p["a"])
    elsewhere = [claim(UNSURE, name=name, section="§3.1") for name in "bc"]
    assert judge(first, *elsewhere).claims.verdict["a"] == "holds"


def test_one_comparison_that_goes_the_other_way_is_enough() -> None:
    """The p-value against a claim is multiplied by the number of comparisons: significant for one, not for six."""
    clear = [-2.0, -1.5, -2.4]
    alone, among = only(judge(claim(clear))), only(judge(claim(*[[20.0, 20.2, 19.9]] * 5, clear)))
    assert (alone.verdict, among.verdict) == ("contradicted", "undecided")
    assert among.p_against == pytest.approx(6 * alone.p_against)
    early = only(judge(claim(clear, *[None] * 5)))  # what is planned counts, so that an early look costs nothing
    assert early.p_against == pytest.approx(among.p_against)


def test_what_took_part_in_a_choice_is_shown_and_does_not_count() -> None:
    judged = judge(stated(comparison(UP), comparison(DOWN, left_out="fitted")))
    assert only(judged).verdict == "holds"
    text = claims.to_markdown(judged, "cpu")
    assert "1 of 1 agree; 1 used to choose a setting" in text
    assert "a > b (used to choose a setting)" in text


def test_a_withheld_claim_is_not_judged_and_not_in_holms_family() -> None:
    others = [claim(UNSURE, name=name, withheld="The networks are not trained to an end.") for name in "bc"]
    judged = judge(claim([2.0, 1.0, 3.0, 0.9], name="a"), *others)
    assert judged.claims["verdict"].tolist() == ["holds", "withheld", "withheld"]
    assert judged.claims["p_holm"].isna().tolist() == [False, True, True]
    assert "Withheld: The networks are not" in claims.to_markdown(judged, "cpu")


def test_a_claim_that_was_written_when_a_comparison_was_known_is_not_tested() -> None:
    some = stated(comparison(UP), comparison(UP, fresh=0), name="b")
    judged = judge(claim([2.0, 1.0, 3.0, 0.9], name="a"), some, stated(comparison(DOWN, fresh=0), name="c"))
    assert judged.claims["words"].tolist() == ["holds", "direction only: for, post hoc", "direction only: against, post hoc"]
    assert judged.claims["p_holm"].isna().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("ended", "own", "known"),
    [
        (["11:00:00+00:00", "11:59:59+00:00"], None, 1),
        (["11:00:00+00:00", "12:00:00+00:00"], None, 0),  # the last run ended when the claim was there
        (["11:00:00+00:00", "11:59:59+00:00"], "2026-12-01T11:30:00Z", 0),  # the claim's own time, not that of the file
        (["12:30:00+01:00", "11:00:00+00:00"], None, 1),  # 11:30 UTC
        (["11:00:00+00:00", "11:59:59+00:00", "13:00:00+00:00", "13:00:00+00:00"], None, 1),  # one seed before, one behind
        (["11:00:00+00:00", "11:59:59+00:00", "11:00:00+00:00", "13:00:00+00:00"], None, 1),
    ],
)
def test_a_seed_is_known_if_all_its_runs_had_ended(
    ended: list[str], own: str | None, known: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specs.load("table", "2.1") | {"seeds": {"quick": [0, 1]}}
    monkeypatch.setattr(specs, "load", lambda kind, number: spec)
    for place, moment in enumerate(ended):
        words = ["experiment=jacobian_distill", "scale=quick", f"method={('ce_a', 'a')[place % 2]}", "data.per_class=1"]
        words += [f"seed={place // 2}"]
        record(tmp_path, words, {"test/accuracy": 5.0}, ended=f"2026-12-01T{moment}")
    rows = ["CE + match activations (A)", "Match activations (A) only"]
    stated = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": rows, "at": ["1", "5"]}
    found = read(tmp_path, [stated | ({"written": own} if own else {})])
    seeds = len(ended) // 2
    assert found.comparisons["fresh"].tolist() == [seeds - known, 0]  # the second has not run
    assert only(found).post_hoc == (known == seeds)
    page = claims.to_markdown(found, "quick")
    assert ("(run before the claim was written)" in page) == (known == seeds)
    assert "left out)" not in page  # one seed alone is no sample


@pytest.mark.parametrize("known", [9.0, -100.0, None])
def test_known_seeds_are_left_out(known: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that diverged leaves no test."""
    spec = specs.load("table", "2.1") | {"seeds": {"quick": list(range(4))}}
    monkeypatch.setattr(specs, "load", lambda kind, number: spec)
    for seed, gap in enumerate([known, 1.0, 2.0, 1.5]):
        for method, value in (("ce_a", gap and 10.0 + gap), ("a", 10.0)):
            words = ["experiment=jacobian_distill", "scale=quick", f"method={method}", "data.per_class=1", f"seed={seed}"]
            moment = LATER if seed else "2026-12-01T11:00:00Z"
            record(tmp_path, words, {"test/accuracy": value}, ended=moment)
    rows = ["CE + match activations (A)", "Match activations (A) only"]
    stated = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": rows, "at": ["1"]}
    found = read(tmp_path, [stated])
    row, alone = found.comparisons.iloc[0], estimate([1.0, 2.0, 1.5], confidence=0.95, resamples=500)
    if known is None:
        assert (row["mean"], row["n"], only(found).verdict) == (-math.inf, 4, "direction only")
        return
    assert (row["mean"], row["n"], row["fresh"], row["p_for"]) == (1.5, 3, 3, pytest.approx(alone.p_for))
    assert (only(found).n, only(found).agreeing, only(found).verdict) == (3, 1, "holds")
    assert row["label"].endswith("(1 of 4 seeds: known when the claim was written, left out)")


def test_the_time_of_a_claim_has_a_zone(tmp_path: Path) -> None:
    spec = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": ["a", "b"], "written": "2026-12-01"}
    with pytest.raises(UserError, match="written='2026-12-01' should name a time zone, as 2026-12-31T23:59:59Z does"):
        read(tmp_path, [spec])


def test_family_wise_error_rate() -> None:
    """Five claims of two comparisons each, all differences noise, three seeds: an error in at most 5 % of chapters."""
    chapters = RNG.normal(0.0, 1.0, (400, 5, 2, 3)).tolist()
    judged = judge(
        *(claim(*two, name=f"{i}-{j}", section=f"§{i}") for i, chapter in enumerate(chapters) for j, two in enumerate(chapter))
    )
    verdicts = judged.claims["verdict"].isin(["holds", "contradicted"])
    assert verdicts.groupby(judged.claims["section"]).any().mean() < 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


# --- the file ---------------------------------------------------------------------------------------------


def grid(spec: dict[str, Any], scale: str = "paper") -> Grid:
    return Grid(spec["item"], spec.get("panel"), scale, at(Path("results"), fake_plan))


@pytest.mark.parametrize("spec", claims.load(FILE)["claims"], ids=lambda spec: spec["id"])
def test_the_thesis_bears_out_its_own_words(spec: dict[str, Any]) -> None:
    """On its printed numbers every claim holds, but for the comparisons that the file excepts, and these do fail."""
    cells = grid(spec)
    found = pairs(spec, cells)
    assert found
    assert spec["section"].startswith(("§", "other, §", "other, table "))
    for pair in found:
        gap = pair.gap.constant + sum(sign * cells.thesis(cell) for sign, cell in pair.gap.cells)
        if math.isnan(gap):
            assert not pair.excepted, "an exception needs numbers"
            continue
        assert (gap > 1e-9) != pair.excepted, f"{pair.label}: {gap}"
    assert not any(pair.excepted for pair in found) or spec["because"]


def test_every_table_and_measured_figure_has_claims() -> None:
    said = {spec["item"] for spec in claims.load(FILE)["claims"]}
    there = {f"{kind} {number}" for kind in ("table", "figure") for number in specs.numbers(kind)}
    looked_at = {f"figure {number}" for number in ("3.3", "3.4", "5.2", "5.4")}  # by eye
    ours = {f"table {number}-readings" for number in ("5.1", "5.5")}  # no claim of the thesis
    ours |= {"table 2.2-readings", "table 2.1-50", "table 2.1-length", "table 2.3-short", "table 4.1-readings-attention"}
    ours |= {"figure shift"}
    assert there - said == looked_at | ours


MISTAKES = {
    "table": ({"item": "table 2.11"}, "did you mean 2.1"),
    "row": ({"greater": ["Cross-Entropy", "Match {A + J}"]}, "did you mean Cross-Entropy (CE)?"),
    "column": ({"at": ["1000"]}, "did you mean 100?"),
    "key": ({"greatr": ["a", "b"]}, "did you mean greater?"),
    "two forms": ({"less": ["Cross-Entropy (CE)", "Match {A + J}"]}, "greater and less"),
    "cell": ({"greater": [{"rwo": "Cross-Entropy (CE)"}, 0]}, "did you mean row?"),
    "exception": ({"except": [["a", "b", "1"]]}, "there is no comparison"),
    "fitted": ({"fitted": {"quick": [["Cross-Entropy (CE)", "1000"]]}}, "fitted: there is no comparison"),
    "withheld": ({"withheld": {"quick": {"because": "No.", "cells": [["A", "1"]]}}}, "withheld: there is no comparison"),
    "unit": ({"unit": "image"}, "'seeds' or 'images'"),
    "kind": ({"item": "tabel 2.1"}, "`table NUMBER`"),
    "panel": ({"item": "figure 5.3", "panel": "c", "metric": "accuracy"}, "figure 5.3 has a, b"),
    "metric": ({"item": "table 5.2", "greater": [{"row": "λ = 1e-2", "column": "μ = 1e-2"}, 0]}, "model/accuracy, gan_test"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_misspelt_names_are_errors_that_name_the_nearest(mistake: str, tmp_path: Path) -> None:
    change, message = MISTAKES[mistake]
    spec = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": ["Match {A + J}", "Cross-Entropy (CE)"]}
    with pytest.raises(UserError, match="claim x: ") as caught:
        read(tmp_path, [spec | change])
    assert message.lower() in str(caught.value).lower()


def read(folder: Path, found: list[dict[str, Any]], scale: str = "quick") -> Judged:
    file = folder / "claims.yaml"
    file.write_text(yaml.safe_dump({"confidence": 0.95, "resamples": 500, "written": WRITTEN, "claims": found}))
    return claims.read(file, scale, at(folder, fake_plan))


def record(folder: Path, words: list[str], metrics: dict[str, Any], **facts: Any) -> None:
    config = fake_plan(words).config
    known = {"id": run_id(config), "status": "finished", "config": {"task": {"draws": 10}}, "precision": "32", "ended": LATER}
    write_record(folder / "runs" / config["name"] / f"{run_id(config)}.json", {**known, "metrics": metrics, **facts})


def test_from_records_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are paired: their own ups and downs, larger than the difference, do not hide it. A diverged run is the worst."""
    spec = specs.load("table", "2.1") | {"seeds": {"quick": list(range(8))}}
    monkeypatch.setattr(specs, "load", lambda kind, number: spec)
    rng = np.random.default_rng(1)  # of its own: what it draws must not depend on which tests ran before
    for seed, level in enumerate(rng.normal(50, 20, 8).tolist()):
        for method, extra in (("ce", 0.0), ("ce_a", 1.0), ("a", None)):
            words = ["experiment=jacobian_distill", "scale=quick", f"method={method}", "data.per_class=1", f"seed={seed}"]
            value = None if extra is None else level + extra + rng.normal(0, 0.3)
            record(tmp_path, words, {"test/accuracy": value})
    common = {"section": "§2.6.1", "claim": "A | helps.", "item": "table 2.1", "at": ["1"]}
    rows = ["CE + match activations (A)", "Cross-Entropy (CE)", "Match activations (A) only"]
    part = {"because": "No.", "cells": [[rows[2], "1"]]}
    found = [
        {"id": "a", "greater": rows[:2], **common},
        {"id": "b", "less": rows[:2], **common},
        {"id": "c", "near": rows[:2], "within": 2, **common},
        {"id": "d", "greater": rows[:2], "by": 2, **common},
        {"id": "e", "greater": rows[1:], **common},
        {"id": "f", "greater": [{"row": rows[0], "minus": rows[1]}, 0.5], **common},
        {"id": "g", "greater": rows[:2], **common, "at": ["500"]},
        {"id": "h", "greater": rows[:2], **common, "scales": ["paper"]},
        {"id": "i", "greater": rows[:2], **common, "scales": ["cpu", "quick"]},
        {"id": "j", "greater": rows[:2], **common, "withheld": {"quick": "No."}},
        {"id": "k", "greater": rows[:2], **common, "withheld": {"cpu": "No."}, "fitted": {"cpu": [[*rows[:2], "1"]]}},
        {"id": "l", "greater": [rows[0], rows[1:]], **common, "fitted": {"quick": [[rows[2], "1"]]}},
        {"id": "m", "greater": [rows[0], rows[1:]], **common, "fitted": {"quick": [[rows[0], rows[2], "1"]]}},
        {"id": "n", "greater": [rows[0], rows[1:]], **common, "withheld": {"quick": part}},
    ]
    judged = read(tmp_path, found)
    some = "holds where tested (1 of 2 comparisons)"
    verdicts = ["holds", "contradicted", "holds", "contradicted", "direction only: for", "holds"]
    verdicts += ["not part of this scale", "not part of this scale", "holds", "withheld", "holds", some, some, some]
    assert judged.claims["words"].tolist() == verdicts
    assert judged.claims.loc["a", "n"] == 8
    first = judged.comparisons.drop_duplicates("id").set_index("id")
    assert first.loc[["h", "i"], "in_scale"].tolist() == [False, True]
    assert first.loc["h", "thesis"] == first.loc["i", "thesis"]
    assert first.loc["a", "low"] < 1 < first.loc["a", "high"]
    md, csv = claims.write(judged, "quick", tmp_path)
    assert "14 claims: 8 holds, 2 contradicted, 1 direction only, 1 withheld, 2 not part of this scale." in md.read_text()
    assert len(csv.read_text().splitlines()) == 15
    assert "*Withheld in part: No.*" in md.read_text() and "1 of 1 agree; 1 withheld" in md.read_text()
    assert r"A \| helps" in md.read_text()


@pytest.mark.parametrize("form", ["greater", "less"])
def test_a_diverged_run_recognises_nothing(tmp_path: Path, form: str) -> None:
    """Whatever a claim compares; of two diverged runs neither is better."""
    for method, accuracy in (("ce", None), ("ce_a", 60.0), ("a", None)):
        words = ["experiment=jacobian_distill", "scale=quick", f"method={method}", "data.per_class=1", "seed=0"]
        record(tmp_path, words, {"test/accuracy": accuracy})
    rows = ["CE + match activations (A)", "Cross-Entropy (CE)", "Match activations (A) only"]
    common = {"section": "§2.6.1", "claim": "A helps.", "item": "table 2.1", "at": ["1"]}
    found = read(tmp_path, [{"id": "a", form: rows[:2], **common}, {"id": "b", form: rows[1:], **common}])
    direction = "for" if form == "greater" else "against"
    assert found.claims["words"].tolist() == [f"direction only: {direction}", "direction only: none"]


def test_a_cell_that_occurs_twice_has_twice_its_error(tmp_path: Path) -> None:
    """(a - b) - (b - c): b counts twice, with four times its variance."""
    for saliency in ("random", "input_gradient", "fullgrad_abs"):
        words = ["experiment=mnist_pixel_perturbation", "scale=quick", f"saliency={saliency}", "seed=0"]
        names = [f"test/output_change@removed={fraction}" for fraction in (0.5, 0.7, 0.9)]
        metrics = dict.fromkeys(names, 0.5) | {f"{name}/std": 1.0 for name in names}
        record(tmp_path, words, metrics, images=100)
    common = {"section": "§3", "claim": "x", "item": "table 3.2", "across": "columns", "unit": "images", "at": ["RF = 0.5"]}
    cells = [{"column": "Random", "minus": "Gradient"}, {"column": "Gradient", "minus": "FullGrad"}]
    found = read(tmp_path, [{"id": "a", "less": cells, **common}])
    assert found.comparisons["noise"].tolist() == [pytest.approx(math.sqrt(1 + 4 + 1) / 10)]


def test_numbers_of_a_figure_are_those_of_its_first_series() -> None:
    """Figure 5.5's numbers are of the model whose logit-gradients are fooled."""
    fooled, attempt = (CellName(row, "", "energy/loss/after") for row in ("VGG-11", "VGG-11, loss-gradients"))
    cells = Grid("figure 5.5", None, "cpu", plan)
    assert cells.thesis(fooled) == 48.14 and math.isnan(cells.thesis(attempt))


@pytest.mark.parametrize(
    ("digest", "suffix", "verdict"),
    [("a", "", "holds, for this model"), ("b", " (the model was trained more than once)", "direction only: for")],
)
def test_images_of_one_model_are_a_sample_of_their_own(digest: str, suffix: str, verdict: str, tmp_path: Path) -> None:
    for saliency, mean in (("random", 0.8), ("input_gradient", 0.3)):
        words = ["experiment=mnist_pixel_perturbation", "scale=quick", f"saliency={saliency}", "seed=0"]
        names = [f"test/output_change@removed={fraction}" for fraction in (0.5, 0.7, 0.9)]
        made = {"model": {"id": "m", "experiment": "mnist_classifier", "weights_sha256": "a" if mean > 0.5 else digest}}
        numbers = {key: value for name in names for key, value in ((name, mean), (f"{name}/std", 0.4))}
        record(tmp_path, words, numbers, images=400, upstream=made)
    spec = {
        "id": "x",
        "section": "§3.10",
        "claim": "",
        "item": "table 3.2",
        "across": "columns",
        "less": ["Gradient", "Random"],
    }
    over_images = read(tmp_path, [spec | {"at": ["RF = 0.5"], "unit": "images"}])
    over_seeds = read(tmp_path, [spec | {"at": ["RF = 0.5"]}])
    assert only(over_images).words == verdict
    assert "| 400 images |" in claims.to_markdown(over_images, "quick")
    assert only(over_seeds).verdict == "direction only"
    assert over_images.comparisons["label"].tolist() == [f"Gradient < Random, RF = 0.5{suffix}"]
    assert "table 3.2, over images; another setting" in claims.to_markdown(over_images, "quick")
    assert over_seeds.comparisons["noise"].tolist() == pytest.approx([2**0.5 * 0.4 / 20])


UNLIKE = " (1 of 3 seeds: different trainings of one upstream run; 2 of 3 seeds: different precisions)"


@pytest.mark.parametrize(("digest", "suffix"), [("a", ""), ("b", UNLIKE)])
def test_pairs_of_unlike_runs_say_so(digest: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = specs.load("table", "2.1") | {"seeds": {"cpu": [0, 1, 2]}}
    monkeypatch.setattr(specs, "load", lambda kind, number: table)
    for seed, method in itertools.product((0, 1, 2), ("ce_a", "a")):
        words = ["experiment=jacobian_distill", "scale=cpu", f"method={method}", "data.per_class=1", f"seed={seed}"]
        used = digest if (method, seed) == ("a", 1) else "a"
        made = {"teacher": {"id": "t", "experiment": "teacher", "weights_sha256": used}}
        precision = "bf16" if (digest, method) == ("b", "ce_a") and seed != 1 else "32"
        record(tmp_path, words, {"test/accuracy": 5.0 + seed}, upstream=made, precision=precision)
    rows = ["CE + match activations (A)", "Match activations (A) only"]
    spec = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": rows, "at": ["1"]}
    found = read(tmp_path, [spec], "cpu")
    assert found.comparisons["label"].tolist() == [f"{rows[0]} > {rows[1]}, 1{suffix}"]


def test_a_curve_of_training_counts_at_its_end(tmp_path: Path) -> None:
    for model, losses in (("vgg4", [9.0, 5.0]), ("vgg6", [7.0, 6.0])):
        words = ["experiment=fullgrad_distill", "scale=quick", "data.per_class=5", "method=fg", f"model={model}", "seed=0"]
        record(tmp_path, words, {"train/loss": losses})
    spec = {"id": "x", "section": "§4", "claim": "", "item": "figure 4.1b", "metric": "train/loss", "less": ["VGG-4", "VGG-6"]}
    assert read(tmp_path, [spec]).comparisons["mean"].tolist() == [1.0]


def test_a_figures_cells_are_points_of_its_curves(tmp_path: Path) -> None:
    words = ["experiment=density_ratio", "scale=quick", "upstream.model.method.choice=ce", "seed=0"]
    record(tmp_path, words, {"sigma": [0, 0.1], "density_ratio": [1.0, 2.5]})
    spec = {
        "id": "x",
        "section": "§5.5",
        "claim": "",
        "item": "figure 5.1",
        "metric": "density_ratio",
        "greater": ["Baseline", 2],
    }
    found = read(tmp_path, [spec | {"at": ["0.1"]}])
    assert found.comparisons["mean"].tolist() == [0.5]
    with pytest.raises(UserError, match=r"has no x '0\.11', did you mean 0\.1"):
        read(tmp_path, [spec | {"at": ["0.11"]}])
    with pytest.raises(UserError, match="did you mean density_ratio"):
        read(tmp_path, [spec | {"at": ["0.1"], "metric": "density_ratios"}])


@pytest.mark.parametrize("images", [400, None])
def test_a_ratio_of_densities_has_its_standard_error(images: int | None, tmp_path: Path) -> None:
    """Its deviation has a name of its own, and the number of its images, all where it is null, is a setting of its task."""
    facts = {"config": {"task": {"images": images}}, "data": {"test_images": 400}}
    for choice in ("ce", "score_matching"):
        words = ["experiment=density_ratio", "scale=quick", f"upstream.model.method.choice={choice}", "seed=0"]
        record(
            tmp_path, words, {"sigma": [0, 0.1], "density_ratio/log": [0.0, 2.5], "density_ratio/log_std": [0.0, 3.0]}, **facts
        )
    spec = {"id": "x", "section": "§5.5", "claim": "", "item": "figure 5.1", "metric": "density_ratio/log", "at": ["0.1"]}
    found = read(tmp_path, [spec | {"greater": ["Baseline", "Score-matching"]}])
    assert found.comparisons["noise"].tolist() == [pytest.approx(2**0.5 * 3 / 20)]


def test_rendered_claims_are_up_to_date() -> None:
    """The committed verdicts, and the list of records that nothing shows, are those of the committed records."""
    for file in committed("claims/*.csv"):
        judged = claims.read(FILE, file.stem, plan)
        assert claims.to_csv(judged) == file.read_text(), f"make claims SCALE={file.stem}"
        idle = unshown.find(file.stem, plan, ROOT / "results")
        assert claims.to_markdown(judged, file.stem, idle) == file.with_suffix(".md").read_text(), (
            f"make claims SCALE={file.stem}"
        )


def test_what_is_not_tested_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    untested = {"section": "§3.5.3", "claim": "Maps are sharp.", "because": "the thesis judges by eye"}
    spec = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": ["Match {A + J}", "Cross-Entropy (CE)"]}
    content = {"confidence": 0.95, "resamples": 500, "claims": [spec], "untested": [untested]}
    file.write_text(yaml.safe_dump(content))
    page = claims.to_markdown(claims.read(file, "quick", at(tmp_path, fake_plan)), "quick")
    assert "| Maps are sharp. | §3.5.3 | the thesis judges by eye |" in page
    file.write_text(yaml.safe_dump(content | {"untested": [{"section": "§3.5.3", "claim": "Maps are sharp."}]}))
    with pytest.raises(UserError, match="because"):
        claims.load(file)


def test_a_chapter_says_what_its_evidence_is_at_the_scale(tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    spec = {"id": "x", "section": "§2.6", "claim": "", "item": "table 2.1", "greater": ["Match {A + J}", "Cross-Entropy (CE)"]}
    content = {"confidence": 0.95, "resamples": 500, "claims": [spec]}
    file.write_text(yaml.safe_dump(content | {"findings": {"2": {"quick": ["Jacobians\nhelp <b>."], "cpu": ["Not here."]}}}))
    page = claims.to_markdown(claims.read(file, "quick", at(tmp_path, fake_plan)), "quick")
    assert "### Chapter 2\n\n- Jacobians help &lt;b>.\n\n1 claims" in page and "Not here." not in page
    for findings, message in (
        ({"3": {"cpu": ["A"]}}, "no claim is of chapter '3'; expected 2"),
        ({"2": {"gpu": ["A"]}}, "gpu"),
    ):
        file.write_text(yaml.safe_dump(content | {"findings": findings}))
        with pytest.raises(UserError, match=message):
            claims.load(file)


def test_a_file_without_claims_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "claims.yaml"
    file.write_text("confidence: 0.95\nresamples: 99\nclaims: []\n")
    with pytest.raises(UserError, match="holds no claim; add one, or delete the file"):
        claims.load(file)
    file.write_text("confidence: 95\nresamples: 99\nclaims: []\n")
    with pytest.raises(UserError, match="confidence"):
        claims.load(file)
