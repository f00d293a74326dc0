"""What the thesis says about its tables and figures (conf/claims.yaml), and whether our records say so too.

A claim is a set of comparisons of cells that must all hold. Differences of cells are taken seed by seed. A chapter's claims
share one level of significance (Holm). Nothing is concluded from one seed: such a claim has a direction, and no more, unless
it is about the images of one model.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
import pandas as pd
import yaml
from typing_extensions import TypedDict

from gradexp.base.errors import UserError
from gradexp.base.typed import check, strict
from gradexp.engine.ensure import digests
from gradexp.engine.run import Config, Run
from gradexp.report.grid import Grid, Place
from gradexp.report.inference import BOOTSTRAP_FROM, Estimate, estimate, estimate_over_images, holm
from gradexp.report.specs import Planner
from gradexp.report.writing import markdown, write_beside

VERDICTS = ("holds", "contradicted", "undecided", "direction only", "withheld", "not run")
FORMS = ("greater", "less", "near")
Except = TypedDict("Except", {"except": NotRequired[list[list[str]]]})  # a word that no class can have as a key


@strict
class ClaimSpec(Except):
    """What the keys mean is said at the head of conf/claims.yaml."""

    id: str
    section: str
    says: str
    item: str
    scales: NotRequired[list[str]]
    across: NotRequired[Literal["rows", "columns"]]
    panel: NotRequired[str]
    metric: NotRequired[str]
    greater: NotRequired[list[Any]]  # of cells: names, numbers, CellSpecs, or lists of these
    less: NotRequired[list[Any]]
    near: NotRequired[list[Any]]
    within: NotRequired[float]
    by: NotRequired[float]
    at: NotRequired[list[str | float]]
    unit: NotRequired[Literal["seeds", "images"]]
    because: NotRequired[str]
    withheld: NotRequired[dict[str, str]]
    fitted: NotRequired[dict[str, list[list[str]]]]


@strict
class CellSpec(TypedDict, total=False):
    """A cell as a claim names it; minus: another one, the name of its row, or a number."""

    row: str
    column: str
    metric: str
    minus: Any


@strict
class ClaimsFile(TypedDict):
    confidence: float
    resamples: int
    claims: list[Any]


@dataclass(frozen=True)
class Comparison:
    """One comparison of a claim.

    in_scale: whether this scale has its cells. thesis: the same difference of the thesis's own numbers, where it prints
    them. fitted: whether its cells took part in choosing a setting, so that it is shown and does not count.
    """

    label: str
    in_scale: bool
    estimate: Estimate | None
    noise: float | None  # standard error that the runs have in themselves, over draws or images
    thesis: float | None
    runs: tuple[Run, ...]
    fitted: bool = False

    @property
    def agrees(self) -> bool | None:
        return None if self.estimate is None else self.estimate.mean > 0


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    p: two-sided, the smaller of for and against; p_holm: adjusted for the other claims of the chapter; None where nothing
    was tested. withheld: why this scale's numbers are shown and not judged.
    """

    id: str
    section: str
    says: str
    item: str
    unit: str  # what the intervals are over: seeds, or the images of one model
    note: str
    comparisons: tuple[Comparison, ...]
    verdict: str = "not run"
    p: float | None = None
    p_holm: float | None = None
    withheld: str = ""
    elsewhere: bool = False  # whether this scale's numbers can't be set against the thesis's

    @property
    def chapter(self) -> str:
        return self.section.lstrip("§").partition(".")[0]

    @property
    def planned(self) -> tuple[Comparison, ...]:
        """The comparisons that this scale has, and that count."""
        return tuple(one for one in self.comparisons if one.in_scale and not one.fitted)

    @property
    def run(self) -> tuple[Comparison, ...]:
        return tuple(one for one in self.planned if one.estimate)

    @property
    def agreeing(self) -> int:
        return sum(bool(one.agrees) for one in self.run)

    @property
    def n(self) -> int:
        """Seeds of the comparison that has fewest."""
        return min((one.estimate.n for one in self.run if one.estimate), default=0)


# --- verdicts ---------------------------------------------------------------------------------------------


def judge(claims: Sequence[Judged], *, confidence: float) -> list[Judged]:
    """The claims with their verdicts; Holm's correction is over those of a chapter that can be tested."""
    adjusted: dict[str, float] = {}
    for chapter in {claim.chapter for claim in claims}:
        family = [claim for claim in claims if claim.chapter == chapter and _tested(claim) and not claim.withheld]
        values = holm([min(1.0, 2 * min(sides(claim))) for claim in family])
        adjusted |= {claim.id: value for claim, value in zip(family, values, strict=True)}
    return [_judge(claim, adjusted.get(claim.id), level=1 - confidence) for claim in claims]


def _tested(claim: Judged) -> list[Estimate]:
    return [one.estimate for one in claim.run if one.estimate and one.estimate.p_for is not None]


def sides(claim: Judged) -> tuple[float, float]:
    """One-sided p-values for the claim and against it.

    All comparisons must hold, so the largest p-value speaks for it (an intersection-union test), once all have been run.
    One that fails is enough, so the smallest, times their number, speaks against it.
    """
    tested = _tested(claim)
    whole = len(tested) == len(claim.planned)
    against = min(1.0, len(tested) * min(e.p_against or 0.0 for e in tested))
    return (max(e.p_for or 0.0 for e in tested) if whole else 1.0), against


def _judge(claim: Judged, p_holm: float | None, *, level: float) -> Judged:
    if not claim.run:
        return claim
    if claim.withheld:
        return replace(claim, verdict="withheld")
    decided = p_holm is not None and p_holm < level
    if len(_tested(claim)) < len(claim.planned) and not decided:
        return replace(claim, verdict="direction only")
    supporting, opposing = sides(claim)
    verdict = ("holds" if supporting < opposing else "contradicted") if decided else "undecided"
    return replace(claim, verdict=verdict, p=min(1.0, 2 * min(supporting, opposing)), p_holm=p_holm)


# --- conf/claims.yaml -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """Cells with their signs, and a constant."""

    name: str
    cells: tuple[tuple[int, Place], ...] = ()
    constant: float = 0.0

    def __sub__(self, other: Sum) -> Sum:
        return Sum(
            f"{self.name} − {other.name}",
            self.cells + tuple((-sign, place) for sign, place in other.cells),
            self.constant - other.constant,
        )


@dataclass(frozen=True)
class Pair:
    """One comparison as the file states it: `gap` > 0."""

    label: str
    gap: Sum
    worst: float  # the number of a diverged run
    excepted: bool  # the thesis's own numbers do not bear it out
    name: tuple[str, str, str] = ("", "", "")  # both sides, and the row or column where they are compared


def load(file: Path) -> Config:
    """The file of claims, its keys checked."""
    whole: Config = yaml.safe_load(file.read_text(encoding="utf-8"))
    check(ClaimsFile, whole, file.name)
    for spec in whole["claims"]:
        check(ClaimSpec, spec, f"{file.name}, claim {spec.get('id')}")
    twice = [name for name, count in Counter(spec["id"] for spec in whole["claims"]).items() if count > 1]
    if twice:
        raise UserError(f"{file.name}: the id {twice[0]} is there twice; rename one")
    return whole


def pairs(spec: Config, grid: Grid) -> list[Pair]:
    """The comparisons of a claim. Raises UserError for names that its table or figure does not have."""
    forms = [form for form in FORMS if form in spec]
    if len(forms) != 1:
        raise UserError(f"it says {' and '.join(forms) or 'nothing'}; give one of {', '.join(FORMS)}")
    worst = math.inf if forms[0] == "less" else -math.inf
    levels = [level if isinstance(level, list) else [level] for level in spec[forms[0]]]
    across = spec.get("across", "rows")
    every = list(grid.columns if across == "rows" else grid.rows) or [""]
    other = {"rows": "column", "columns": "row"}[across]
    free = any(isinstance(node, str) or (isinstance(node, dict) and other not in node) for level in levels for node in level)
    places = [str(at) for at in spec.get("at", every if free else [""])]
    excepted = [tuple(map(str, triple)) for triple in spec.get("except", [])]
    found = []
    for at, (upper, lower) in itertools.product(places, itertools.pairwise(levels)):
        for a, b in itertools.product(upper, lower):
            left, right = (_sum(node, at, across, spec.get("metric"), grid) for node in (a, b))
            key = (left.name, right.name, at)
            out = key in excepted
            excepted = [triple for triple in excepted if triple != key]
            found += [
                Pair(label + (f", {at}" if at else ""), gap, worst, out, key)
                for label, gap in _gaps(forms[0], left, right, spec)
            ]
    if excepted:
        raise UserError(f"except: there is no comparison {excepted[0]}")
    return found


def _gaps(form: str, left: Sum, right: Sum, spec: Config) -> Iterator[tuple[str, Sum]]:
    """(label, what must be positive)."""
    if form == "near":
        within = Sum(f"{spec['within']:g}", constant=-float(spec["within"]))
        yield f"{left.name} > {right.name} − {within.name}", left - right - within
        yield f"{left.name} < {right.name} + {within.name}", right - left - within
        return
    margin = float(spec.get("by", 0))
    extra = f" {'+' if (margin > 0) == (form == 'greater') else '−'} {abs(margin):g}" if margin else ""
    gap = left - right if form == "greater" else right - left
    yield f"{left.name} {'>' if form == 'greater' else '<'} {right.name}{extra}", gap - Sum("", constant=margin)


def _sum(node: Any, at: str, across: str, metric: str | None, grid: Grid) -> Sum:
    """A cell as the file names it: a row (or column, `across: columns`), a number, or {row, column, metric, minus}."""
    if isinstance(node, int | float):
        return Sum(f"{node:g}", constant=float(node))
    if isinstance(node, str):
        node = {"row" if across == "rows" else "column": node}
    check(CellSpec, node, "cell")
    row, column = (str(node.get(key, "" if across == key + "s" else at)) for key in ("row", "column"))
    place = Place(row, column, node.get("metric", metric))
    grid.check(place)
    name = " at ".join(str(node[key]) for key in ("row", "column", "metric") if key in node)
    whole = Sum(name, ((1, place),))
    return whole if "minus" not in node else whole - _sum(node["minus"], at, across, metric, grid)


def read(file: Path, scale: str, plan: Planner) -> list[Judged]:
    """Every claim of the file with its verdict at a scale."""
    whole = load(file)
    grids: dict[tuple[str, str | None], Grid] = {}
    claims = []
    for spec in whole["claims"]:
        key = spec["item"], spec.get("panel")
        try:
            grid = grids.setdefault(key, grids.get(key) or Grid(*key, scale, plan))
            claims.append(_claim(spec, grid, whole, here=scale in spec.get("scales", [scale])))
        except UserError as error:
            raise UserError(f"{file.name}, claim {spec['id']}: {error}") from None
    return judge(claims, confidence=whole["confidence"])


def _claim(spec: Config, grid: Grid, whole: Config, *, here: bool) -> Judged:
    """here: whether the claim is one about what this scale runs; the names of its cells are checked anyway."""
    unit = spec.get("unit", "seeds")
    stated = [pair for pair in pairs(spec, grid) if not pair.excepted]
    fitted = _fitted(spec, grid, stated)
    found = [replace(_compare(pair, grid, unit, whole, here=here), fitted=pair in fitted) for pair in stated]
    says, note, withheld = (
        " ".join(str(text).split())
        for text in (spec.get("says", ""), spec.get("because", ""), spec.get("withheld", {}).get(grid.scale, ""))
    )
    names = (str(spec["id"]), spec["section"], says, spec["item"])
    return Judged(*names, unit, note, tuple(found), withheld=withheld, elsewhere=not grid.comparable)


def _fitted(spec: Config, grid: Grid, stated: Sequence[Pair]) -> list[Pair]:
    """The comparisons whose cells took part in choosing a setting of this scale.

    The spec names them one by one, [a, b, at] as under `except`, or by a cell, [row, column], whatever it is compared with.
    """
    found: list[Pair] = []
    for entry in spec.get("fitted", {}).get(grid.scale, []):
        words = tuple(map(str, entry))
        some = [
            pair
            for pair in stated
            if pair.name == words or any((place.row, place.column) == words for _, place in pair.gap.cells)
        ]
        if not some:
            raise UserError(f"fitted: there is no comparison, and no cell of one, {words}")
        found += some
    return found


def _compare(pair: Pair, grid: Grid, unit: str, whole: Config, *, here: bool) -> Comparison:
    cells = pair.gap.cells
    printed = [(sign, grid.thesis(place)) for sign, place in cells]
    thesis = None if None in [x for _, x in printed] else pair.gap.constant + sum(sign * (x or 0.0) for sign, x in printed)
    if not here:
        return Comparison(pair.label, False, None, None, thesis, ())
    behind = [grid.runs(place) for _, place in cells]
    values = [(sign, grid.values(place)) for sign, place in cells]
    seeds = sorted(set.intersection(*(set(found) for _, found in values)))
    signed = [[(sign, found[seed].value) for sign, found in values] for seed in seeds]
    gaps = [pair.gap.constant + sum(sign * (pair.worst if math.isnan(x) else x) for sign, x in one) for one in signed]
    errors = [found[seed].error for _, found in values for seed in seeds]
    noise = None if None in errors or not seeds else math.sqrt(sum((e or 0.0) ** 2 for e in errors) / len(seeds))
    if unit == "images" and seeds:
        estimated: Estimate | None = estimate_over_images(float(np.mean(gaps)), noise, whole["confidence"])
    else:
        estimated = estimate(gaps, confidence=whole["confidence"], resamples=whole["resamples"]) if seeds else None
    runs = tuple(dict.fromkeys(run for found in behind for run in found.values()))
    label = pair.label
    made_of = [digests(record.get("upstream", {})) for run in runs if (record := run.record())]
    if unit == "images" and any(one != made_of[0] for one in made_of):
        label += " (on two makings of the model)"
    return Comparison(label, all(behind), estimated, noise, thesis, runs)


# --- pages ------------------------------------------------------------------------------------------------


def to_csv(claims: Sequence[Judged]) -> str:
    """One line a claim; comparisons: in the thesis, those of this scale that count (`planned`), run, and agreeing."""
    rows = [
        {
            **{name: getattr(claim, name) for name in ("id", "section", "item", "says", "verdict", "unit")},
            **{name: len(getattr(claim, name)) for name in ("comparisons", "planned", "run")},
            "agreeing": claim.agreeing,
            "seeds": claim.n,
            **{name: "" if value is None else f"{value:.4g}" for name, value in (("p", claim.p), ("p_holm", claim.p_holm))},
        }
        for claim in claims
    ]
    return pd.DataFrame(rows).to_csv(index=False)


def verdict(claim: Judged) -> str:
    """The verdict in words, with what it lacks."""
    if claim.unit == "images" and claim.verdict in ("holds", "contradicted"):
        return f"{claim.verdict}, for this model"
    if claim.verdict == "direction only":
        return f"direction only: {({len(claim.run): 'for', 0: 'against'}).get(claim.agreeing, 'mixed')}"
    if claim.verdict == "undecided" and claim.unit == "seeds":
        return f"undecided (n = {claim.n})"
    return claim.verdict


def to_markdown(claims: Sequence[Judged], scale: str, *, confidence: float) -> str:
    """A table of verdicts a chapter, and every comparison behind them."""
    lines = [f"**Claims of the thesis, scale={scale}.** {tally(claims)}", "", *explanation(confidence)]
    for chapter, group in itertools.groupby(claims, key=lambda claim: claim.chapter):
        some = list(group)
        lines += ["", f"### Chapter {chapter}", "", tally(some), ""]
        heads = ("claim", "where", "comparisons", "seeds", "p (Holm)", "verdict")
        lines += markdown(pd.DataFrame(map(summary, some), columns=heads))
        lines += ["", "<details><summary>Comparisons</summary>", ""]
        named = ("claim", "comparison", "by how much", "seeds", "thesis")
        details = [[f"`{claim.id}`", *detail(one, claim.unit)] for claim in some for one in claim.comparisons]
        lines += markdown(pd.DataFrame(details, columns=named))
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def tally(claims: Sequence[Judged]) -> str:
    """`12 claims: 3 hold, ...`"""
    counts = Counter(claim.verdict for claim in claims)
    return f"{len(claims)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name])}."


def explanation(confidence: float) -> list[str]:
    return [
        f"- A claim **holds** when all its comparisons do, and is **contradicted** when one goes the other way, at a level "
        f"of {1 - confidence:g} that the claims of a chapter share (Holm). Differences are paired by seed (Student's test).",
        f"- Intervals ({confidence:.0%}) are bootstrapped over seeds from {BOOTSTRAP_FROM} seeds on, and Student's below.",
        "- **Undecided**: tested, and neither; n is the smallest number of seeds of a comparison. **Direction only**: a "
        "comparison has one seed, seeds without spread, or is not run yet, so the claim can't be tested; the verdict says "
        "which way the numbers point. The number of seeds is decided before a run, not by what a test finds.",
        "- **Withheld**: the numbers are shown, but can't show what is claimed; the reason stands with the claim. Comparisons "
        "whose cells took part in choosing a setting are shown and don't count.",
        "- *Over images*: saliency methods on one trained model are compared over its test images (normal theory, as if each "
        "method had images of its own). Such a verdict is about this model. In all other claims the spread inside a run, over "
        "draws of noise or samples, decides nothing; it is shown behind ± in brackets where there is one seed.",
        "- *Another setting*: at this scale the data, the networks or the length of training are so unlike the thesis's that "
        "its numbers, and their differences in the last column, can't be compared; a verdict is about this setting. What "
        "departs stands under the table or figure. The thesis's numbers for figure 3.2 are read off its poster.",
    ]


def summary(claim: Judged) -> list[str]:
    where = f"{claim.section}, {claim.item}" + (", over images" if claim.unit == "images" else "")
    where += "; another setting" if claim.elsewhere else ""
    says = f"`{claim.id}` {claim.says}" + (f" ({claim.note})" if claim.note else "")
    says += f" *Withheld: {claim.withheld}*" if claim.withheld else ""
    fitted = sum(one.fitted and one.in_scale for one in claim.comparisons)
    out = len(claim.comparisons) - len(claim.planned) - fitted
    count = f"{claim.agreeing} of {len(claim.run)} agree"
    absent = len(claim.planned) - len(claim.run)
    parts = [*([count] if claim.run else []), *([f"{absent} not run"] if absent else [])]
    parts += [f"{fitted} took part in a choice"] if fitted else []
    parts += [f"{out} not part of this scale"] if out else []
    return [says, where, "; ".join(parts), str(claim.n or ""), _p(claim.p_holm), f"**{verdict(claim)}**"]


def detail(one: Comparison, unit: str) -> list[str]:
    thesis = "" if one.thesis is None else f"{one.thesis:+.4g}"
    e = one.estimate
    if e is None:
        return [one.label, "not run" if one.in_scale else "not part of this scale", "", thesis]
    label = one.label + (" (took part in choosing a setting)" if one.fitted else "")
    width = f" [{e.low:+.4g}, {e.high:+.4g}]" if e.low is not None and e.high is not None else ""
    inside = f" (± {one.noise:.2g} inside the run)" if one.noise and e.n == 1 and unit == "seeds" else ""
    return [label, f"{e.mean:+.4g}{width}{inside}", str(e.n), thesis]


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def write(claims: Sequence[Judged], scale: str, results: Path, *, confidence: float) -> list[Path]:
    """Writes results/claims/<scale>.md and .csv."""
    contents = {"md": to_markdown(claims, scale, confidence=confidence), "csv": to_csv(claims)}
    return write_beside(results / "claims" / scale, contents)
