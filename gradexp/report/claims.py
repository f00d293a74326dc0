"""The thesis's claims about its tables and figures (conf/claims.yaml), tested on our records.

A claim is a set of comparisons of cells that must all hold. Differences of cells are paired by seed. The claims of a chapter
share one level of significance (Holm). A comparison of one seed has a direction and no test, except in claims over the images
of one model.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

import numpy as np
import pandas as pd
from annotated_types import Gt, Lt
from typing_extensions import TypedDict

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count
from gradexp.base.texts import read_yaml
from gradexp.base.typed import check, strict
from gradexp.engine.record import Moment, Record, used_digests
from gradexp.report import specs
from gradexp.report.comparisons import ClaimSpec, Grid, Pair, Part, Scale, pairs
from gradexp.report.inference import BOOTSTRAP_FROM, Estimate, estimate, estimate_over_images, holm
from gradexp.report.specs import Planner
from gradexp.report.unshown import Unshown
from gradexp.report.writing import csv, rendered, write_beside

OTHER = "other"  # the chapter of second readings of a claim, and of substitutes for one
VERDICTS = ("holds", "contradicted", "undecided", "direction only", "withheld", "not part of this scale", "not run")
NUMBERS = ["thesis", "noise", *(each.name for each in fields(Estimate) if each.name != "n")]
COLUMNS = ["id", "label", "in_scale", "left_out", "runs", "seeds", "n", "fresh", *NUMBERS]  # of Judged.comparisons


@strict
class Untested(TypedDict):
    """A sentence of the thesis that no claim tests, and why."""

    section: str
    claim: str
    because: str


@strict
class ClaimsFile(TypedDict):
    confidence: Annotated[float, Gt(0), Lt(1)]
    resamples: Count
    written: NotRequired[Moment]  # of claims that name no other time
    claims: list[dict[str, Any]]  # ClaimSpecs, of which `load` checks each
    findings: NotRequired[dict[str, dict[Scale, list[str]]]]  # what a chapter's evidence says, by chapter and scale
    untested: NotRequired[list[Untested]]


def load(file: Path) -> ClaimsFile:
    """The file of claims. Raises UserError for unknown or missing keys, no claim, and an id that occurs twice."""
    content: ClaimsFile = check(ClaimsFile, read_yaml(file), file.name)
    if not content["claims"]:
        raise UserError(f"{file} holds no claim; add one, or delete the file")
    for spec in content["claims"]:
        check(ClaimSpec, spec, f"{file.name}, claim {spec.get('id')}")
    known = {_chapter(spec) for spec in content["claims"]}
    for chapter in content.get("findings", {}):
        if chapter not in known:
            raise UserError(f"{file.name}, findings: no claim is of chapter {chapter!r}; expected {', '.join(sorted(known))}")
    for name, count in Counter(spec["id"] for spec in content["claims"]).items():
        if count > 1:
            raise UserError(f"{file.name}: the id {name} is used {count} times; rename one claim")
    return content


def _chapter(spec: Mapping[str, Any]) -> str:
    section = spec["section"]
    return OTHER if section.startswith(OTHER) else section.lstrip("§").partition(".")[0]


# --- verdicts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Claims with their verdicts, and the comparisons behind them.

    claims, one row each, indexed by id: section, chapter (or OTHER), claim, item, unit (of the sample: `seeds`, or the `images`
    of one model), because, withheld (why this scale's numbers are not judged), withheld_in_part, comparable (with the thesis's
    numbers); and what `judge` adds. comparisons, one row each: id, label, in_scale, left_out (why it is not counted:
    `fitted`, its cells took part in choosing a setting; `withheld`; or ""), thesis (the difference of the thesis's numbers),
    noise (standard error inside the runs), runs, seeds (planned), fresh (how many of its seeds or images were not known when
    the claim was written) and the fields of Estimate (n=0: not run).
    """

    claims: pd.DataFrame
    comparisons: pd.DataFrame
    confidence: float
    untested: Sequence[Untested] = ()
    findings: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by chapter


def read(file: Path, scale: str, plan: Planner) -> Judged:
    """Every claim of the file with its verdict at a scale."""
    content = load(file)
    grids: dict[Any, Grid] = {}
    claims, comparisons = [], []
    for spec in cast(list[ClaimSpec], content["claims"]):
        item = spec["item"], spec.get("panel")
        try:
            grid = grids[item] = grids.get(item) or Grid(*item, scale, plan)
            comparisons += _comparisons(spec, grid, content)
        except UserError as error:
            raise UserError(f"{file.name}, claim {spec['id']}: {error}") from None
        reason = _withheld(spec, scale)
        part = "" if isinstance(reason, str) else reason["because"]
        texts = {"claim": spec["claim"], "because": spec.get("because", ""), "withheld_in_part": part}
        texts["withheld"] = reason if isinstance(reason, str) else ""
        row = {key: " ".join(text.split()) for key, text in texts.items()}
        row |= {"id": spec["id"], "section": spec["section"], "chapter": _chapter(spec), "item": spec["item"]}
        claims.append({**row, "unit": spec.get("unit", "seeds"), "comparable": grid.comparable})
    numbers = pd.DataFrame(comparisons, columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))
    by_scale: Mapping[str, Mapping[Any, list[str]]] = content.get("findings", {})
    findings = {chapter: texts[scale] for chapter, texts in by_scale.items() if scale in texts}
    frame = pd.DataFrame(claims).set_index("id")
    return judge(Judged(frame, numbers, content["confidence"], content.get("untested", []), findings))


def _withheld(spec: ClaimSpec, scale: Any) -> str | Part:
    return spec.get("withheld", {}).get(scale, "")


def _left_out(spec: ClaimSpec, grid: Grid, known: Iterable[Pair]) -> dict[tuple[str, ...], str]:
    """{comparison or cell that is not counted at this scale: why}, see Judged.comparisons."""
    fitted: Mapping[Any, list[list[str]]] = spec.get("fitted", {})
    reason = _withheld(spec, grid.scale)
    withheld = [] if isinstance(reason, str) else reason["cells"]
    found = {}
    for why, entries in (("withheld", withheld), ("fitted", fitted.get(grid.scale, []))):
        for entry in (tuple(map(str, each)) for each in entries):
            if not any(pair.matches(entry) for pair in known):
                raise UserError(f"{why}: there is no comparison and no cell of one {entry}")
            found[entry] = why
    return found


def _comparisons(spec: ClaimSpec, grid: Grid, content: ClaimsFile) -> list[dict[str, Any]]:
    """Rows of Judged.comparisons; the names of cells are checked at scales that the claim is not about, too."""
    stated = [pair for pair in pairs(spec, grid) if not pair.excepted]
    left_out = _left_out(spec, grid, stated)
    rows = []
    for pair in stated:
        if not pair.gap.cells:
            raise UserError(f"{pair.label}: two numbers are compared; name a cell")
        printed = sum(sign * grid.thesis(cell) for sign, cell in pair.gap.cells)
        row: dict[str, Any] = {"id": spec["id"], "label": pair.label, "thesis": pair.gap.constant + printed}
        row |= {"left_out": next((why for entry, why in left_out.items() if pair.matches(entry)), "")}
        row |= {"in_scale": False, "runs": [], "seeds": 0, "n": 0, "fresh": 0}
        if grid.scale in spec.get("scales", [grid.scale]):
            row |= _compare(pair, grid, spec, content)
        rows.append(row)
    return rows


def _compare(pair: Pair, grid: Grid, spec: ClaimSpec, content: ClaimsFile) -> dict[str, Any]:
    """A comparison on the seeds whose runs are finished in all its cells.

    Seeds whose runs had all ended when the claim was written are left out if at least two others remain; with fewer, all are
    shown and none is tested.
    """
    written = spec.get("written", content.get("written"))
    times, cells = zip(*pair.gap.cells, strict=True)
    grids = [grid.runs(cell) for cell in cells]
    runs = [list(each.values()) for each in grids]
    unique = list(dict.fromkeys(itertools.chain(*runs)))
    numbers = pd.concat([grid.values(cell) for cell in cells], axis=1, join="inner")
    with np.errstate(invalid="ignore"):  # two diverged runs: -inf + inf
        gaps = pair.gap.constant + (numbers[["value"]] * times).sum(axis=1, skipna=False)
    noise = math.sqrt(((numbers[["error"]] * times).to_numpy() ** 2).sum() / len(numbers)) if len(numbers) else math.nan
    row = {"in_scale": all(runs), "noise": noise, "runs": unique, "seeds": min(map(len, runs))}
    if not len(numbers):
        return row
    if spec.get("unit", "seeds") == "seeds":
        compared = [[run.record() for each in grids if (run := each.get(seed))] for seed in numbers.index]
        fresh = [gap for gap, records in zip(gaps, compared, strict=True) if not _ended(records, written)]
        unlike = {"different trainings of one upstream run": _stand_apart, "different precisions": _differ_in_precision}
        counts = {what: sum(map(differ, compared)) for what, differ in unlike.items()}
        is_tested = len(fresh) > 1 and bool(np.isfinite(gaps).all())
        counts["known when the claim was written, left out"] = len(gaps) - len(fresh) if is_tested else 0
        if notes := [f"{count} of {len(numbers)} seeds: {what}" for what, count in counts.items() if count]:
            row["label"] = f"{pair.label} ({'; '.join(notes)})"
        sample = fresh if is_tested else gaps.tolist()
        found = estimate(sample, confidence=content["confidence"], resamples=content["resamples"])
        if not is_tested:
            found = replace(found, p_for=math.nan, p_against=math.nan)
        return {**row, **asdict(found), "fresh": len(fresh)}
    mean = float(gaps.mean())
    records = [record for run in unique if (record := run.record())]
    row["n"] = n = min(record.get("images", 1) for record in records)
    row["fresh"] = 0 if _ended(records, written) else n
    models = {str(used_digests(record.get("upstream", {}))) for record in records}
    if len(models) > 1:  # how much these differ is not known
        return {**row, "mean": mean, "label": f"{pair.label} (the model was trained more than once)"}
    return {**row, **asdict(estimate_over_images(mean, noise, n, content["confidence"]))}


def _ended(records: Iterable[Record | None], written: str | None) -> bool:
    """Whether all runs had ended when the claim was written."""
    ended = [datetime.fromisoformat(record["ended"]) for record in records if record]
    return written is not None and max(ended) < datetime.fromisoformat(written)


def _stand_apart(records: Iterable[Record | None]) -> bool:
    """Whether runs that are compared used different files of one upstream run, which was then trained more than once."""
    used: dict[str, set[str]] = {}
    for record in filter(None, records):
        for below in record.get("upstream", {}).values():
            used.setdefault(str(below["id"]), set()).update(used_digests({"": below}).values())
    return any(len(digests) > 1 for digests in used.values())


def _differ_in_precision(records: Iterable[Record | None]) -> bool:
    return len({record["precision"] for record in filter(None, records)}) > 1


def judge(found: Judged) -> Judged:
    """Add the verdicts; Holm's correction is over the claims of a chapter that are tested, not withheld and not post hoc.

    A claim is post hoc if no seed of one of its comparisons is fresh. All comparisons of a claim must hold: once all are
    tested, the largest p-value supports it (an intersection-union test). One that fails is enough, so the smallest,
    times the number planned, opposes it. Columns: comparisons, fitted and held_back (the numbers of those left out), planned
    (of this scale that count), run, agreeing, opposing, n (the smallest sample), seeds (planned), post_hoc, refuting (how
    many are significantly against it, without Holm's correction), p_for, p_against (one-sided), p (two-sided), p_holm,
    verdict, and words (the verdict with its direction, extent, sample or restriction to one model).
    """
    in_scale = found.comparisons[found.comparisons["in_scale"]]
    counted = in_scale[in_scale["left_out"] == ""]
    signs = {"agrees": lambda frame: frame["mean"] > 0, "opposes": lambda frame: frame["mean"] < 0}  # neither: NaN
    done = counted[counted["n"] > 0].assign(**signs).groupby("id")
    counts = {
        "comparisons": found.comparisons.groupby("id").size(),
        "fitted": (in_scale["left_out"] == "fitted").groupby(in_scale["id"]).sum(),
        "held_back": (in_scale["left_out"] == "withheld").groupby(in_scale["id"]).sum(),
        "planned": counted.groupby("id").size(),
        "run": done.size(),
        "agreeing": done["agrees"].sum(),
        "opposing": done["opposes"].sum(),
        "n": done["n"].min(),
        "seeds": done["seeds"].min(),
        "tested": done["p_for"].count(),
        "weakest": counted.sort_values("p_for").groupby("id")["n"].last(),  # sample of the largest p-value
    }
    claims = found.claims.join(pd.DataFrame(counts)).fillna(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, int))
    claims["post_hoc"] = claims.index.isin(done["fresh"].min().loc[lambda fresh: fresh == 0].index)
    complete, level = (claims["tested"] == claims["planned"]) & ~claims["post_hoc"], 1 - found.confidence
    claims["p_for"] = done["p_for"].max().reindex(claims.index).where(complete, 1.0)
    claims["p_against"] = (claims["planned"] * done["p_against"].min().reindex(claims.index)).clip(upper=1)
    single = (2 * counted["p_against"] * counted["id"].map(claims["planned"]) < level).groupby(counted["id"]).sum()
    claims["refuting"] = single.reindex(claims.index).fillna(0).astype(int)
    claims["p"] = (2 * claims[["p_for", "p_against"]].min(axis=1)).clip(upper=1)
    family = claims[(claims["tested"] > 0) & (claims["withheld"] == "") & ~claims["post_hoc"]]
    claims["p_holm"] = family.groupby("chapter")["p"].transform(lambda p: holm(p.tolist())).reindex(claims.index)
    decided = claims["p_holm"] < level
    verdicts = {
        "not part of this scale": claims["planned"] == 0,
        "withheld": claims["withheld"] != "",
        "not run": claims["run"] == 0,
        "holds": decided & (claims["p_for"] < claims["p_against"]),
        "contradicted": decided,
        "undecided": complete,
    }
    claims["verdict"] = np.select(list(verdicts.values()), list(verdicts), "direction only")
    is_tested = claims["verdict"].isin(["holds", "contradicted", "undecided"])
    claims[["p", "p_holm"]] = claims[["p", "p_holm"]].where(is_tested)
    claims["words"] = [_words(row) for row in claims.itertuples()]
    return replace(found, claims=claims)


def _words(row: Any) -> str:
    model = ", for this model" if row.unit == "images" else ""
    if row.verdict == "holds":
        part = f" where tested ({row.planned} of {row.comparisons} comparisons)" if row.planned < row.comparisons else ""
        return f"holds{part}{model}"
    if row.verdict == "contradicted":
        part = f" in {row.refuting} of {row.planned} comparisons" if row.planned > 1 else ""
        return f"contradicted{part}{model}"
    if row.verdict == "direction only":
        signs = {"for": row.agreeing == row.run, "against": row.opposing == row.run, "none": row.agreeing + row.opposing == 0}
        sign = next((name for name, is_so in signs.items() if is_so), "mixed")
        run = f", {row.run} of {row.planned} run" if row.run < row.planned else ""
        return f"direction only: {sign}{run}{', post hoc' if row.post_hoc else ''}"
    return f"undecided (n = {row.weakest})" if row.verdict == "undecided" and not model else str(row.verdict)


# --- files ------------------------------------------------------------------------------------------------


def tally(verdicts: Iterable[str], what: str = "claims") -> str:
    """`12 claims: 3 holds, ...`"""
    counts = Counter(verdicts)
    return f"{counts.total()} {what}: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name])}."


def explanation(found: Judged) -> dict[str, list[str]]:
    """What the verdicts mean (`words`) and how they are made (`tests`), in Markdown."""
    numbers = {"level": f"{1 - found.confidence:.0%}", "confidence": f"{found.confidence:.0%}", "bootstrap": BOOTSTRAP_FROM}
    texts = specs.settings()["verdicts"]
    return {kind: [" ".join(text.format(**numbers).split()) for text in listed] for kind, listed in texts.items()}


def views(found: Judged) -> list[dict[str, Any]]:
    """Claims with the rows of their comparisons, for templates."""
    rows: Any = found.comparisons.to_dict("records")
    claims: Any = found.claims.reset_index().to_dict("records")
    return [{**claim, "details": [row for row in rows if row["id"] == claim["id"]]} for claim in claims]


def to_csv(found: Judged) -> str:
    """One line a claim."""
    frame = found.claims.reset_index()
    for name in ("p", "p_holm"):
        frame[name] = frame[name].map("{:.4g}".format, na_action="ignore")
    columns = ["id", "section", "item", "claim", "verdict", "words", "unit", "comparisons", "planned", "run", "agreeing", "n"]
    return csv(frame[[*columns, "p", "p_holm"]])


def to_markdown(found: Judged, scale: str, unshown: Sequence[Unshown] = ()) -> str:
    """A table of verdicts for each chapter, every comparison behind them, and the records that no table or figure shows."""
    content = {"claims": views(found), "explanation": explanation(found), "tally": tally}
    content |= {"untested": found.untested, "findings": found.findings, "unshown": unshown}
    return rendered("claims.md", scale=scale, **content)


def write(found: Judged, scale: str, results: Path, unshown: Sequence[Unshown] = ()) -> list[Path]:
    """Write results/claims/<scale>.md and .csv."""
    contents = {"md": to_markdown(found, scale, unshown), "csv": to_csv(found)}
    return write_beside(results / "claims" / scale, contents)
