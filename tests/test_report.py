"""The page of `make report`, read as a browser's parser reads it."""

import base64
import hashlib
import io
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fakes import at, fake_plan, fake_run
from PIL import Image
from test_tables import GOLDEN, SPEC

from gradexp.engine.record import write_record
from gradexp.engine.run import ROOT, Run, run_id
from gradexp.report import claims, figures, html, provenance, specs, tables, writing
from gradexp.report.unshown import Unshown

pytestmark = pytest.mark.usefixtures("sample_records")

HOSTILE = '</script><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'
SETTINGS = specs.settings()
BENCH = json.loads(min((ROOT / "results" / "bench").glob("*.json")).read_text())  # as `make bench` writes it
COSTS = [{"": "table 2.1", "present": "5", "missing": "3", "hours": "0.42", "known from": "3 record"}]


class Parsed(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def whole(scale: str, seed: int, overrides: Sequence[str], **facts: Any) -> dict[str, Any]:
    """A record with everything that real ones have."""
    config = fake_plan(overrides).config
    return {
        "id": run_id(config),
        "experiment": config["name"],
        "scale": scale,
        "seed": seed,
        "status": "finished",
        "config": config | {"seed": seed, "optim": {"passes": 60, "optimizer": {"lr": 0.001, "name": "Adam"}}},
        "metrics": {"test/accuracy": 10.0 + seed, "train/loss": [4 / (1 + i) for i in range(500)]},
        "upstream": {},
        "data": {"name": "toy", "train_images": 100, "subset": "0123456789abcdef"},
        "device": "cpu",
        "precision": "32",
        "threads": 1,
        "parameters": 718692,
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "seconds": {"wall": 36.0, "cpu": 30.0},
        "started": "2026-01-02T03:04:05+00:00",
        "ended": "2026-01-02T03:04:41+00:00",
        **facts,
    }


def fill(results: Path, scale: str = "cpu", device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The golden records made whole, and two at `quick`; one of them diverged. -> {id: record}"""
    stored = {}
    teacher = whole(scale, 0, ["experiment=teacher", f"scale={scale}"])
    for method, count, seed in (("ce", 1, 0), ("ce", 1, 1), ("ce", 5, 0), ("a", 1, 0), ("a", 5, 0)):
        words = ["experiment=jacobian_distill", f"scale={scale}", f"method={method}", f"data.per_class={count}", f"seed={seed}"]
        record = whole(scale, seed, words, device=device, upstream={"teacher": {"id": teacher["id"], "experiment": "teacher"}})
        golden = GOLDEN / "runs" / "jacobian_distill" / f"{record['id']}.json"
        record["metrics"] |= json.loads(golden.read_text())["metrics"] if golden.exists() else {}
        stored[record["id"]] = record
    stored[teacher["id"]] = teacher | {"metrics": {"test/accuracy": 63.9}}
    for record in stored.values():
        write_record(results / "runs" / record["experiment"] / f"{record['id']}.json", record)
    return stored


def picture(results: Path, scale: str) -> np.ndarray:
    """Writes figure 2.1's files; returns its pixels."""
    pixels = (255 * np.random.default_rng(0).random((20, 30, 3))).astype(np.uint8)
    pixels[:10] = 255
    stem = results / "figures" / scale / "figure_2_1"
    stem.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(stem.with_suffix(".png"), compress_level=0)
    stem.with_suffix(".csv").write_text("x,mean\n1,2\n")
    return pixels


def judged(sources: Sequence[Run], claim: str = "A beats CE.") -> claims.Judged:
    """One claim that holds, with one comparison."""
    numbers = {"n": 2, "mean": 3.5, "low": 1.0, "high": 6.0, "p_for": 0.02, "p_against": 0.98, "thesis": 5.04}
    comparison = {"id": "2.1-a", "label": "A minus CE, 1", "in_scale": True, "left_out": "", "fresh": 2}
    comparison |= {"runs": list(sources), **numbers}
    texts = {"claim": claim, "because": "", "withheld": "", "withheld_in_part": "", "section": "§2.6.1", "chapter": "2"}
    facts = {"item": "table 2.1", "unit": "seeds", "comparable": True}
    row = pd.DataFrame([{"id": "2.1-a", **texts, **facts}]).set_index("id")
    comparisons = pd.DataFrame([comparison], columns=claims.COLUMNS).astype(dict.fromkeys(claims.NUMBERS, float))
    return claims.judge(claims.Judged(row, comparisons, 0.95))


def render(results: Path, scale: str = "cpu", spec: dict[str, Any] = SPEC, words: str = "") -> str:
    """A page with one table, one drawn figure, one without its runs, a claim and a benchmark."""
    teacher = fake_plan(["experiment=teacher", f"scale={scale}"])
    panels, planner = html.Panels(points=100), at(results, lambda words: replace(fake_plan(words), below={"teacher": teacher}))
    table = tables.build(spec, scale, planner)
    filled = [run for run in table.runs if run.finished]
    drawn = {"number": "2.1", "title": f"Fits {words}"}, [figures.Series({"label": f"fit {words}"}, tuple(filled[:1]))]
    absent = {"number": "other", "title": "Not drawn"}, [figures.Series({"label": "gone"}, tuple(table.missing[:1]))]
    origin = provenance.origin_of(*provenance.records_of(filled[:1])).sentences
    caption = provenance.Caption([f"Departs from `paper`. {words}", *origin], [], origin=origin)
    views = {
        "tables": [html.table_view(table, panels, SETTINGS["close"])],
        "figures": [html.figure_view(*one, scale, results, panels, caption) for one in (drawn, absent)],
        "claims": html.claim_views(judged(filled[:2], f"A beats CE. {words}"), panels),
    }
    return html.render(scale, views, panels, SETTINGS, made_by="gradexp, commit 01234567", bench=[BENCH], costs=COSTS)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = tmp_path_factory.mktemp("results")
    fill(results)
    picture(results, "cpu")
    return render(results)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_every_cell_is_there_with_both_numbers_and_opens_its_records_or_its_command(page: str) -> None:
    parsed, data = Parsed(page), data_of(page)
    labels = {found["href"][1:]: found["aria-label"] for found in parsed.of("a") if "aria-label" in found}
    assert labels["cell-2.1-0-0"].startswith("Cross-Entropy (CE), 1: 5.22 ± 0.27 (n=2); thesis 5.69; difference −0.47; below")
    assert labels["cell-2.1-0-1"] == "Cross-Entropy (CE), 5: NaN (n=1); thesis 13.9; diverged"
    assert len(labels) == len([found for found in parsed.of("td") if "cell" in found.get("class", "")]) == 4
    cell = data["entries"]["cell-2.1-1-1"]
    assert (cell["title"], cell["runs"]) == ("A only · 5", ["d53379d2c6d7"])
    assert cell["todo"] == ["python run.py experiment=jacobian_distill scale=cpu method=a data.per_class=5 seed=1"]
    assert data["records"]["d53379d2c6d7"]["command"].endswith("method=a data.per_class=5 seed=0")


def test_links_stay_inside_and_nothing_is_loaded(page: str) -> None:
    parsed, data = Parsed(page), data_of(page)
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    panels = {*data["entries"], *(f"run-{run}" for run in data["records"])}
    addresses = [found[key] for _, found in parsed.elements for key in ("href", "src") if key in found]
    for address in addresses:
        assert address.startswith("data:") or address[1:] in {*ids, *panels}, address
    assert {one["runs"][0] for one in data["entries"].values() if one["runs"]} <= data["records"].keys()
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_only_the_pages_own_script_may_run(page: str) -> None:
    script = (writing.PAGES / "page.js").read_text()
    (policy,) = (found["content"] for found in Parsed(page).of("meta") if found.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"<script>{script}</script>" in page
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_markup_in_records_and_configs_is_text(tmp_path: Path) -> None:
    fill(tmp_path, device=HOSTILE)
    rows = [SPEC["rows"][0], SPEC["rows"][1] | {"label": f"A {HOSTILE}"}]
    page = render(tmp_path, spec=SPEC | {"rows": rows, "note": HOSTILE, "title": HOSTILE}, words=HOSTILE)
    parsed, data = Parsed(page), data_of(page)
    assert len(parsed.of("script")) == 2
    assert not any(key.startswith("on") for _, found in parsed.elements for key in found)
    assert not [found for found in parsed.of("img") if not found["src"].startswith("data:image/")]
    assert HOSTILE in {record["device"] for record in data["records"].values()}
    assert HOSTILE in "".join(parsed.text)


def test_a_number_of_a_smaller_scale_is_never_set_against_the_thesis(tmp_path: Path) -> None:
    fill(tmp_path, "quick")
    page = render(tmp_path, "quick", SPEC | {"comparable": ["paper"]})
    marks = {found["class"].split()[1] for found in Parsed(page).of("td") if "cell" in found.get("class", "")}
    assert marks == {"apart"}
    assert "difference" not in json.dumps(data_of(page)["entries"])
    assert page.count("scale=quick") > 4
    assert "they can't be compared with ours" in "".join(Parsed(page).text)


def test_departures_from_the_paper_are_listed(page: str) -> None:
    text = " ".join("".join(Parsed(page).text).split())
    assert "Departs from scale=paper in 1 setting" in text
    assert "optim.passes60500" in text.replace(" ", "")
    for sentence in ("A sample & nothing more.", "the thesis's 64.78", "Seeds: 0, 1"):
        assert sentence in text
    assert SETTINGS["scales"]["cpu"].strip() in text


def test_a_record_is_stored_once_and_complete(tmp_path: Path) -> None:
    stored = fill(tmp_path)
    data = data_of(render(tmp_path))
    assert data["records"].keys() == stored.keys()
    for run, record in stored.items():
        found = data["records"][run]
        assert found["config"] == record["config"]
        assert found["numbers"] == json.loads(
            json.dumps({"test/accuracy": record["metrics"]["test/accuracy"]}).replace("NaN", "null")
        )


def test_long_curves_are_means_of_stretches() -> None:
    assert html.curve([1, 2, 3, 4], 2) == {"n": 4, "y": [1.5, 3.5]}
    assert html.curve([1.0, None, None, None], 2) == {"n": 4, "y": [1.0, None]}
    assert html.curve([0.123456], 2) == {"n": 1, "y": [0.1235]}
    assert html.curve([], 2) == {"n": 0, "y": [None]}


def mark(ours: float | None, thesis: float | None, **changes: Any) -> str:
    """The mark of a cell with these numbers."""
    difference = None if ours is None or thesis is None else ours - thesis
    row = {"ours": ours, "thesis": thesis, "difference": difference, "std": None, "thesis_std": None, **changes}
    counts = {"n": int(ours is not None), "planned": changes.get("planned", 1), "inside": changes.get("inside", False)}
    numbers = ["ours", "thesis", "difference", "std", "thesis_std"]
    (found,) = html.marks(pd.DataFrame([row | counts]).astype(dict.fromkeys(numbers, float)), 0.05)
    return str(found)


@pytest.mark.parametrize(
    ("ours", "thesis", "changes", "expected"),
    [
        (10.4, 10.0, {}, "close"),
        (9.4, 10.0, {}, "below"),
        (-0.5, -1.0, {}, "above"),
        (float("nan"), 10.0, {}, "diverged"),
        (10.0, 10.0, {"difference": None}, "apart"),
        (10.0, None, {}, "apart"),
        (None, 10.0, {}, "not run"),
        (10.4, 10.0, {"planned": 0}, "absent"),
        (9.4, 10.0, {"std": 1.98}, "close"),
        (9.4, 10.0, {"std": 1.98, "inside": True}, "below"),  # over images, not over runs
        (9.4, 10.0, {"thesis_std": 0.7}, "close"),
        (9.4, 10.0, {"thesis_std": 0.5}, "below"),
    ],
)
def test_marks(ours: float | None, thesis: float | None, changes: dict[str, Any], expected: str) -> None:
    assert mark(ours, thesis, **changes) == expected


def test_a_picture_keeps_its_pixels_and_its_values(tmp_path: Path) -> None:
    fill(tmp_path)
    pixels = picture(tmp_path, "cpu")
    parsed = Parsed(render(tmp_path))
    (image,) = parsed.of("img")
    content = base64.b64decode(image["src"].partition("base64,")[2])
    assert np.array_equal(np.array(Image.open(io.BytesIO(content)).convert("RGB")), pixels)
    (link,) = parsed.of("a", download="figure_2_1.csv")
    assert base64.b64decode(link["href"].partition("base64,")[2]) == b"x,mean\n1,2\n"


def headlines(page: str) -> list[list[str]]:
    """The texts of each row of the headlines: label, ours, thesis."""
    found = []
    for card in re.findall(r'<article class="headline">(.*?)</article>', page, re.S):
        for row in re.findall(r"<tr.*?</tr>", card.partition("<tbody>")[2], re.S):
            found.append([" ".join("".join(Parsed(cell).text).split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)])
    return found


def test_headlines_are_the_numbers_of_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"table": "2.1", "column": "1", "baseline": "Cross-Entropy (CE)", "title": "One image"}
    monkeypatch.setitem(SETTINGS, "headlines", [entry, entry | {"table": "9.9"}, entry | {"column": "500"}])
    fill(tmp_path)
    cells = tables.build(SPEC, "cpu", at(tmp_path, fake_plan)).by_row
    expected = [[row, cells[row][0]["mean"], cells[row][0]["thesis"]] for row in ("Cross-Entropy (CE)", "A only")]
    assert (
        headlines(render(tmp_path)) == expected == [["Cross-Entropy (CE)", "5.22 ± 0.27", "5.69"], ["A only", "8.95", "10.73"]]
    )


def test_headlines_of_a_smaller_scale_are_not_compared(tmp_path: Path) -> None:
    page = render(tmp_path, "quick", SPEC | {"comparable": ["paper"]})
    card = page.partition('<article class="headline">')[2].partition("</article>")[0]
    assert "At this scale the thesis's numbers can't be compared with ours." in "".join(Parsed(card).text)


@pytest.mark.parametrize("entry", SETTINGS["headlines"], ids=lambda entry: str(entry["table"]))
def test_declared_headlines_exist(entry: dict[str, str]) -> None:
    axis, other = ("column", "row") if "column" in entry else ("row", "column")
    spec = specs.load("table", entry["table"])
    assert entry[axis] in [part["label"] for part in spec[f"{axis}s"]]
    assert entry["baseline"] in [part["label"] for part in spec[f"{other}s"]]
    assert spec.get("best_per", "column") == axis


def test_comparisons_against_a_claim_come_first() -> None:
    (view,) = html.claim_views(judged([]), html.Panels(points=9))
    changes = [{"label": "agreeing"}, {"label": "absent", "n": 0, "mean": np.nan}, {"label": "opposed", "mean": -1.0}]
    views = {"tables": [], "figures": [], "claims": [view | {"details": [view["details"][0] | change for change in changes]}]}
    page = html.render("cpu", views, html.Panels(points=9), SETTINGS, made_by="")
    assert re.findall(r"agreeing|absent|opposed", page.partition("<main>")[2]) == ["opposed", "agreeing", "absent"]


def test_claims_count_by_standing() -> None:
    (view,) = html.claim_views(judged([]), html.Panels(points=9))
    mixed = view | {"id": "other", "verdict": "direction only", "standing": "mixed", "words": "direction only: mixed"}
    page = html.render(
        "cpu",
        {"claims": [view, mixed, mixed | {"id": "third"}]} | {"tables": [], "figures": []},
        html.Panels(9),
        SETTINGS,
        made_by="",
    )
    text = " ".join("".join(Parsed(page).text).split())
    assert "3 claims: 1 holds, 2 point both ways." in text
    links = [found["class"] for found in Parsed(page).of("a") if found["href"].startswith("#verdict-")]
    assert links == ["verdict holds", "verdict mixed"]


def test_claims_without_numbers_are_folded_by_their_verdict() -> None:
    """A claim that the scale does not test is not listed among those that wait for runs."""
    (view,) = html.claim_views(judged([]), html.Panels(points=9))
    idle = [view | {"id": name, "standing": name, "words": name, "run": 0} for name in claims.VERDICTS[-2:]]
    page = html.render("cpu", {"claims": idle} | {"tables": [], "figures": []}, html.Panels(9), SETTINGS, made_by="")
    text = " ".join("".join(Parsed(page).text).split())
    assert "2 claims: none is decided, 1 is not part of this scale, 1 has not been run." in text
    assert "1 claim not part of this scale" in text and "1 claim not run" in text
    assert "verdict not-part-of-this-scale" in page


def test_records_that_nothing_shows_are_listed() -> None:
    record = whole("cpu", 0, ["experiment=mine", "scale=cpu"])
    idle = [Unshown(record, "table 2.1, CE, 5", {"optim.passes": ("3", "<9>")})]
    page = html.render(
        "cpu", {kind: [] for kind in ("claims", "tables", "figures")}, html.Panels(9), SETTINGS, made_by="", unshown=idle
    )
    text = " ".join("".join(Parsed(page).text).split())
    assert "1 record that no table or figure shows" in text
    assert f"{record['id']}2026-01-02mine" in text and "optim.passes 3 (there <9>)" in text
    md = claims.to_markdown(judged([]), "cpu", idle).rpartition("###")[2]
    assert f"| [{record['id']}](../runs/mine/{record['id']}.json) | 2026-01-02 | mine |" in md
    assert md.count("\n| [") == 1


def test_figures_keep_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Also where the first is not drawn."""
    picture(tmp_path, "cpu")
    panels, caption = html.Panels(points=9), provenance.Caption([], [])
    shown = [html.figure_view({"number": n, "title": ""}, [], "cpu", tmp_path, panels, caption) for n in ("2.0", "2.1", "2.2")]
    page = html.render("cpu", {"tables": [], "figures": shown, "claims": []}, panels, SETTINGS, made_by="")
    assert [found["id"] for found in Parsed(page).of("figure")] == ["figure-2.0", "figure-2.1", "figure-2.2"]
    assert len(Parsed(page).of("img")) == 1


def test_the_plan_lists_what_is_missing(tmp_path: Path) -> None:
    views: dict[str, Any] = {"tables": [], "figures": [], "claims": []}
    costs = [*COSTS, COSTS[0] | {"": "table 9.9", "missing": ""}]
    page = html.render("cpu", views, html.Panels(points=9), SETTINGS, made_by="", costs=costs)
    assert "table 2.1" in page
    assert "table 9.9" not in page


def test_figures_claims_and_benchmark(page: str) -> None:
    text = " ".join("".join(Parsed(page).text).split())
    assert "1 run is missing: make figure-other SCALE=cpu" in text
    assert "A beats CE. ✓ holds §2.6.1, table 2.1; 1 of 1 agree; 2 seeds; p = 0.040 (Holm)" in text
    assert "A minus CE, 1+3.5 [+1, +6]2+5.04" in text
    assert "1 claim: 1 holds." in text
    assert len(data_of(page)["entries"]["claim-2.1-a"]["runs"]) == 2
    assert "table2.1530.423record" in text.replace(" ", "")
    said = [SETTINGS["bench"][part] for part in BENCH if part != "machine"]
    assert len(said) == 6 and all(f"{caption}; commit " in text for caption in said)
    assert f"{BENCH['machine']['device']} {said[0]}" in text
    step = BENCH["steps"]["rows"][0]
    assert f"{step['model']}{step['precision']}{step['kind']}" in text.replace(" ", "")
    assert "Beyond the thesis" in text


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    fill(tmp_path)
    assert render(tmp_path) == render(tmp_path)


def test_a_page_of_no_records_says_what_to_run(tmp_path: Path) -> None:
    data = data_of(render(tmp_path))
    assert data["records"] == {}
    assert all(entry["todo"] for anchor, entry in data["entries"].items() if anchor.startswith("cell"))


def test_make_report_writes_the_page_of_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, on one real table and the figure whose run has no data set."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import make_report

    monkeypatch.setattr(make_report.specs, "numbers", lambda kind: ["4.1-size"] if kind == "table" else ["2.1"])
    claim = "{id: 4-size, section: §4.4.1, claim: A claim., item: table 4.1-size, greater: [VGG-11, VGG-4]}"
    (tmp_path / "claims.yaml").write_text(f"confidence: 0.95\nresamples: 99\nclaims:\n- {claim}\n")
    monkeypatch.setattr(make_report, "CLAIMS", tmp_path / "claims.yaml")
    monkeypatch.setattr(sys, "argv", ["make_report.py", "--scale", "quick", "--set", f"paths.results={tmp_path}"])
    make_report.main()
    page = (tmp_path / "report" / "quick.html").read_text()
    ids = {found["id"] for _, found in Parsed(page).elements if "id" in found}
    assert {"table-4.1-size", "figure-2.1", "claims-4", "plan"} <= ids
    monkeypatch.setattr(sys, "argv", ["make_report.py", "--scale", "nope"])
    with pytest.raises(SystemExit, match="scale=nope"):
        make_report.main()


def test_a_picture_of_other_runs_is_told(tmp_path: Path) -> None:
    """A seed that came after it was drawn, or went."""
    page, sources = tmp_path / "figure_9.md", [fake_run(12 * name, tmp_path) for name in "ab"]
    page.write_text(f"[it](../../runs/x/{12 * 'a'}.json)")
    assert not html.stale(page, sources[:1])
    assert html.stale(page, sources)
    assert html.stale(page, [])
