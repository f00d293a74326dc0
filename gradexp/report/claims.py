"""The thesis's claims about its tables and figures (conf/claims.yaml), tested on our records.

A claim is a set of comparisons of cells that must all hold. Differences of cells are paired by seed. The claims of a chapter
share one level of significance (Holm). A claim with a comparison of one seed is not tested, unless it is over the images of
one model: then only its direction is reported.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

import numpy as np
import pandas as pd
from typing_extensions import TypedDict

from gradexp.base.errors import UserError
from gradexp.base.texts import read_yaml
from gradexp.base.typed import check, strict
from gradexp.engine.ensure import digests
from gradexp.engine.run import Config
from gradexp.report import specs
from gradexp.report.grid import Cell, Grid
from gradexp.report.inference import BOOTSTRAP_FROM, Estimate, estimate, estimate_over_images, holm
from gradexp.report.specs import Planner
from gradexp.report.writing import csv, folded, markdown, plain, write_beside

VERDICTS = ("holds", "contradicted", "undecided", "direction only", "withheld", "not run")
FORMS = ("greater", "less", "near")
NUMBERS = ["thesis", "noise", *(field.name for field in fields(Estimate) if field.name != "n")]
COLUMNS = ["id", "label", "in_scale", "fitted", "runs", "n", *NUMBERS]  # of Judged.comparisons
Except = TypedDict("Except", {"except": NotRequired[list[list[str]]]})  # a keyword, which a class can't have as a key


@strict
class ClaimSpec(Except):
    """The head of conf/claims.yaml describes the keys."""

    id: str
    section: str
    claim: str
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
    """A cell as a claim names it; minus: another cell, the name of its row, or a number."""

    row: str
    column: str
    metric: str
    minus: Any


@strict
class ClaimsFile(TypedDict):
    confidence: float
    resamples: int
    claims: list[dict[str, Any]]


def load(file: Path) -> Config:
    """The file of claims. Raises UserError for unknown or missing keys and for an id that occurs twice."""
    content: Any = check(ClaimsFile, read_yaml(file), file.name)
    for spec in content["claims"]:
        check(ClaimSpec, spec, f"{file.name}, claim {spec.get('id')}")
    for name, count in Counter(spec["id"] for spec in content["claims"]).items():
        if count > 1:
            raise UserError(f"{file.name}: the id {name} is used {count} times; rename one claim")
    return dict(content)


# --- the comparisons of a claim ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """Cells with their signs, and a constant."""

    name: str
    cells: tuple[tuple[int, Cell], ...] = ()
    constant: float = 0.0

    def __sub__(self, other: Sum) -> Sum:
        negated = tuple((-sign, cell) for sign, cell in other.cells)
        return Sum(f"{self.name} − {other.name}", self.cells + negated, self.constant - other.constant)


class Pair(NamedTuple):
    """One comparison: it holds if `gap` > 0."""

    label: str
    gap: Sum
    worst: float  # stands for the number of a diverged run
    names: tuple[str, str, str]  # both sides, and the row or column where they are compared
    excepted: bool  # the thesis's own numbers contradict it


def pairs(spec: Config, grid: Grid) -> list[Pair]:
    """The comparisons of a claim. Raises UserError for names that its table or figure does not have."""
    forms = [form for form in FORMS if form in spec]
    if len(forms) != 1:
        raise UserError(f"expected one of {', '.join(FORMS)}, got {' and '.join(forms) or 'none'}")
    worst = math.inf if forms[0] == "less" else -math.inf
    levels = [level if isinstance(level, list) else [level] for level in spec[forms[0]]]
    excepted = {tuple(map(str, names)) for names in spec.get("except", [])}
    found = []
    for at, (upper, lower) in itertools.product(_positions(spec, levels, grid), itertools.pairwise(levels)):
        for a, b in itertools.product(upper, lower):
            left, right = _sum(a, at, spec, grid), _sum(b, at, spec, grid)
            names = (left.name, right.name, at)
            found += [
                Pair(label + (f", {at}" if at else ""), gap, worst, names, names in excepted)
                for label, gap in _gaps(forms[0], left, right, spec)
            ]
    if unknown := excepted - {pair.names for pair in found}:
        raise UserError(f"except: there is no comparison {unknown.pop()}")
    return found


def _positions(spec: Config, levels: Sequence[Sequence[Any]], grid: Grid) -> list[str]:
    """The columns (`across: columns`: rows) at which cells are compared; [""] if every cell names its own."""
    if "at" in spec:
        return [str(at) for at in spec["at"]]
    known, key = (grid.rows, "row") if spec.get("across") == "columns" else (grid.columns, "column")
    nodes = itertools.chain(*levels)
    needed = any(isinstance(node, str) or (isinstance(node, dict) and key not in node) for node in nodes)
    return list(known) if needed and known else [""]


def _gaps(form: str, left: Sum, right: Sum, spec: Config) -> Iterator[tuple[str, Sum]]:
    """Label and what must be positive: one comparison, two for `near`."""
    if form == "near":
        within = Sum(f"{spec['within']:g}", constant=-float(spec["within"]))
        yield f"{left.name} > {right.name} − {within.name}", left - right - within
        yield f"{left.name} < {right.name} + {within.name}", right - left - within
        return
    margin = float(spec.get("by", 0))
    extra = f" {'+' if (margin > 0) == (form == 'greater') else '−'} {abs(margin):g}" if margin else ""
    gap = left - right if form == "greater" else right - left
    yield f"{left.name} {'>' if form == 'greater' else '<'} {right.name}{extra}", gap - Sum("", constant=margin)


def _sum(node: Any, at: str, spec: Config, grid: Grid) -> Sum:
    """A cell of the file: the name of a row (`across: columns`: of a column), a number, or a CellSpec."""
    if isinstance(node, int | float):
        return Sum(f"{node:g}", constant=float(node))
    own, other = ("column", "row") if spec.get("across") == "columns" else ("row", "column")
    if isinstance(node, str):
        node = {own: node}
    check(CellSpec, node, "cell")
    names = {own: str(node.get(own, "")), other: str(node.get(other, at))}
    cell = Cell(**names, metric=node.get("metric", spec.get("metric")))
    grid.check(cell)
    found = Sum(" at ".join(str(node[key]) for key in ("row", "column", "metric") if key in node), ((1, cell),))
    return found - _sum(node["minus"], at, spec, grid) if "minus" in node else found


def _is_fitted(pair: Pair, entry: tuple[str, ...]) -> bool:
    """Whether an entry of `fitted` names the comparison, [a, b, at], or one of its cells, [row, column]."""
    return pair.names == entry or any((cell.row, cell.column) == entry for _, cell in pair.gap.cells)


# --- from the file to verdicts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Claims with their verdicts, and the comparisons behind them.

    claims, one row each, indexed by id: section, chapter, claim, item, unit (of the sample: `seeds`, or the `images` of one
    model), because, withheld (why this scale's numbers are not judged), comparable (with the thesis's numbers); and what
    `judge` adds. comparisons, one row each: id, label, in_scale, fitted (its cells took part in choosing a setting: not
    counted), thesis (the difference of the thesis's numbers), noise (standard error inside the runs), runs, and the fields of
    Estimate (n=0: not run).
    """

    claims: pd.DataFrame
    comparisons: pd.DataFrame


def read(file: Path, scale: str, plan: Planner) -> Judged:
    """Every claim of the file with its verdict at a scale."""
    content = load(file)
    grids: dict[Any, Grid] = {}
    claims, comparisons = {}, []
    for spec in content["claims"]:
        name, item = spec["id"], (spec["item"], spec.get("panel"))
        try:
            grid = grids[item] = grids.get(item) or Grid(*item, scale, plan)
            comparisons += [{"id": name, **row} for row in _comparisons(spec, grid, content)]
        except UserError as error:
            raise UserError(f"{file.name}, claim {name}: {error}") from None
        texts = {
            "claim": spec["claim"],
            "because": spec.get("because", ""),
            "withheld": spec.get("withheld", {}).get(scale, ""),
        }
        claims[name] = {
            **{key: " ".join(text.split()) for key, text in texts.items()},
            **{"section": spec["section"], "item": spec["item"], "unit": spec.get("unit", "seeds")},
            **{"chapter": spec["section"].lstrip("§").partition(".")[0], "comparable": grid.comparable},
        }
    numbers = pd.DataFrame(comparisons, columns=COLUMNS).astype(dict.fromkeys(NUMBERS, float))
    frame = pd.DataFrame.from_dict(claims, orient="index").rename_axis("id")
    return judge(Judged(frame, numbers), confidence=content["confidence"])


def _comparisons(spec: Config, grid: Grid, content: Config) -> list[Config]:
    """Rows of Judged.comparisons; the names of cells are checked at scales that the claim is not about, too."""
    counted = [pair for pair in pairs(spec, grid) if not pair.excepted]
    fitted = [tuple(map(str, entry)) for entry in spec.get("fitted", {}).get(grid.scale, [])]
    for entry in fitted:
        if not any(_is_fitted(pair, entry) for pair in counted):
            raise UserError(f"fitted: there is no comparison and no cell of one {entry}")
    rows = []
    for pair in counted:
        printed = sum(sign * grid.thesis(cell) for sign, cell in pair.gap.cells)
        row = {"label": pair.label, "thesis": pair.gap.constant + printed, "in_scale": False, "runs": [], "n": 0}
        if grid.scale in spec.get("scales", [grid.scale]):
            row |= _compare(pair, grid, spec.get("unit", "seeds"), content)
        rows.append({**row, "fitted": any(_is_fitted(pair, entry) for entry in fitted)})
    return rows


def _compare(pair: Pair, grid: Grid, unit: str, content: Config) -> Config:
    """A comparison on the seeds whose runs are finished in all its cells."""
    signs, cells = zip(*pair.gap.cells, strict=True)
    runs = [list(grid.runs(cell).values()) for cell in cells]
    unique = list(dict.fromkeys(itertools.chain(*runs)))
    numbers = pd.concat([grid.values(cell) for cell in cells], axis=1, join="inner")
    gaps = pair.gap.constant + (numbers[["value"]].fillna(pair.worst) * signs).sum(axis=1, skipna=False)
    noise = math.sqrt((numbers[["error"]].to_numpy() ** 2).sum() / len(numbers)) if len(numbers) else math.nan
    row = {"in_scale": all(runs), "noise": noise, "runs": unique}
    if not len(numbers):
        return row
    if unit == "seeds":
        found = estimate(gaps.tolist(), confidence=content["confidence"], resamples=content["resamples"])
        return {**row, **asdict(found)}
    models = {str(digests(record.get("upstream", {}))) for run in unique if (record := run.record())}
    label = pair.label + (" (the model was trained more than once)" if len(models) > 1 else "")
    return {**row, **asdict(estimate_over_images(float(gaps.mean()), noise, content["confidence"])), "label": label}


def judge(found: Judged, *, confidence: float) -> Judged:
    """Add the verdicts; Holm's correction is over the claims of a chapter that are tested and not withheld.

    All comparisons of a claim must hold: once all are tested, the largest p-value supports it (an intersection-union test).
    One that fails is enough, so the smallest, times their number, opposes it. Columns: comparisons, planned (those of this
    scale that count), run, agreeing, n (the smallest number of seeds), p_for, p_against (one-sided), p (two-sided), p_holm
    and verdict.
    """
    counted = found.comparisons[found.comparisons["in_scale"] & ~found.comparisons["fitted"]]
    done = counted[counted["n"] > 0].assign(agrees=lambda frame: frame["mean"] > 0).groupby("id")
    counts = {
        "comparisons": found.comparisons.groupby("id").size(),
        "planned": counted.groupby("id").size(),
        "run": done.size(),
        "agreeing": done["agrees"].sum(),
        "n": done["n"].min(),
        "tested": done["p_for"].count(),
    }
    claims = found.claims.join(pd.DataFrame(counts)).fillna(dict.fromkeys(counts, 0)).astype(dict.fromkeys(counts, int))
    complete, level = claims["tested"] == claims["planned"], 1 - confidence
    claims["p_for"] = done["p_for"].max().reindex(claims.index).where(complete, 1.0)
    claims["p_against"] = (claims["tested"] * done["p_against"].min().reindex(claims.index)).clip(upper=1)
    claims["p"] = (2 * claims[["p_for", "p_against"]].min(axis=1)).clip(upper=1)
    family = claims[(claims["tested"] > 0) & (claims["withheld"] == "")]
    claims["p_holm"] = family.groupby("chapter")["p"].transform(lambda p: holm(p.tolist())).reindex(claims.index)
    decided = claims["p_holm"] < level
    verdicts = {
        "not run": claims["run"] == 0,
        "withheld": claims["withheld"] != "",
        "holds": decided & (claims["p_for"] < claims["p_against"]),
        "contradicted": decided,
        "undecided": complete,
    }
    claims["verdict"] = np.select(list(verdicts.values()), list(verdicts), "direction only")
    is_tested = claims["verdict"].isin(["holds", "contradicted", "undecided"])
    claims[["p", "p_holm"]] = claims[["p", "p_holm"]].where(is_tested)
    return Judged(claims, found.comparisons)


# --- files ------------------------------------------------------------------------------------------------


def tally(verdicts: pd.Series[str]) -> str:
    """`12 claims: 3 holds, ...`"""
    counts = Counter(verdicts)
    return f"{len(verdicts)} claims: {', '.join(f'{counts[name]} {name}' for name in VERDICTS if counts[name])}."


def to_csv(found: Judged) -> str:
    """One line a claim."""
    frame = found.claims.reset_index().rename(columns={"n": "seeds"})
    for name in ("p", "p_holm"):
        frame[name] = frame[name].map("{:.4g}".format, na_action="ignore")
    columns = ["id", "section", "item", "claim", "verdict", "unit", "comparisons", "planned", "run", "agreeing", "seeds"]
    return csv(frame[[*columns, "p", "p_holm"]])


def to_markdown(found: Judged, scale: str, *, confidence: float) -> str:
    """A table of verdicts for each chapter, and every comparison behind them."""
    lines = [f"**Claims of the thesis, scale={scale}.** {tally(found.claims['verdict'])}", "", *explanation(confidence)]
    claims, comparisons = shown(found), comparisons_shown(found)
    rows: Any = claims.itertuples()
    claims["claim"] = [
        f"`{row.Index}` {plain(row.claim)}"
        + (f" ({plain(row.because)})" if row.because else "")
        + (f" *Withheld: {plain(row.withheld)}*" if row.withheld else "")
        for row in rows
    ]
    claims["verdict"] = "**" + claims["verdict"] + "**"
    claims["where"], comparisons["comparison"] = claims["where"].map(plain), comparisons["comparison"].map(plain)
    for chapter, group in claims.groupby("chapter", sort=False):
        lines += ["", f"### Chapter {chapter}", "", tally(found.claims.loc[group.index, "verdict"]), ""]
        lines += markdown(group[["claim", "where", "comparisons", "seeds", "p (Holm)", "verdict"]])
        details = comparisons[comparisons["claim"].isin(group.index)]
        lines += ["", *folded("Comparisons", markdown(details.assign(claim="`" + details["claim"] + "`")))]
    return "\n".join(lines) + "\n"


def explanation(confidence: float) -> list[str]:
    """How verdicts are made, as list items in Markdown."""
    numbers = {"level": f"{1 - confidence:g}", "confidence": f"{confidence:.0%}", "bootstrap": BOOTSTRAP_FROM}
    return [f"- {' '.join(text.format(**numbers).split())}" for text in specs.settings()["verdicts"]]


def shown(found: Judged) -> pd.DataFrame:
    """The claims as text: claim, because, withheld, chapter, unit, where, comparisons, seeds, p (Holm), verdict."""
    fitted = found.comparisons[found.comparisons["fitted"] & found.comparisons["in_scale"]].groupby("id").size()
    claims = found.claims.assign(fitted=fitted.reindex(found.claims.index, fill_value=0))
    texts = claims[["claim", "because", "withheld", "chapter", "unit"]].copy()
    texts["where"] = claims["section"] + ", " + claims["item"] + claims["unit"].map({"images": ", over images", "seeds": ""})
    texts["where"] += claims["comparable"].map({True: "", False: "; another setting"})
    texts["comparisons"] = [_counts(row) for row in claims.itertuples()]
    texts["seeds"] = claims["n"].replace(0, "").astype(str)
    texts["p (Holm)"] = ["" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in claims["p_holm"]]
    texts["verdict"] = [_words(row) for row in claims.itertuples()]
    return texts


def _counts(row: Any) -> str:
    counts = {
        f"{row.agreeing} of {{}} agree": row.run,
        "{} not run": row.planned - row.run,
        "{} took part in a choice": row.fitted,
        "{} not part of this scale": row.comparisons - row.planned - row.fitted,
    }
    return "; ".join(text.format(count) for text, count in counts.items() if count)


def _words(row: Any) -> str:
    """The verdict with its direction, its number of seeds or its restriction to one model."""
    if row.unit == "images" and row.verdict in ("holds", "contradicted"):
        return f"{row.verdict}, for this model"
    if row.verdict == "direction only":
        return f"direction only: {({row.run: 'for', 0: 'against'}).get(row.agreeing, 'mixed')}"
    if row.verdict == "undecided" and row.unit == "seeds":
        return f"undecided (n = {row.n})"
    return str(row.verdict)


def comparisons_shown(found: Judged) -> pd.DataFrame:
    """The comparisons as text: claim, comparison, by how much, seeds, thesis."""
    frame = found.comparisons.assign(unit=found.comparisons["id"].map(found.claims["unit"]))
    fitted = (frame["fitted"] & (frame["n"] > 0)).map({True: " (took part in choosing a setting)", False: ""})
    return pd.DataFrame(
        {
            "claim": frame["id"],
            "comparison": frame["label"] + fitted,
            "by how much": [_difference(row) for row in frame.itertuples()],
            "seeds": frame["n"].replace(0, "").astype(str),
            "thesis": frame["thesis"].map("{:+.4g}".format, na_action="ignore").fillna(""),
        }
    )


def _difference(row: Any) -> str:
    if not row.n:
        return "not run" if row.in_scale else "not part of this scale"
    width = "" if math.isnan(row.low) else f" [{row.low:+.4g}, {row.high:+.4g}]"
    inside = f" (± {row.noise:.2g} inside the run)" if row.noise > 0 and row.n == 1 and row.unit == "seeds" else ""
    return f"{row.mean:+.4g}{width}{inside}"


def write(found: Judged, scale: str, results: Path, *, confidence: float) -> list[Path]:
    """Write results/claims/<scale>.md and .csv."""
    contents = {"md": to_markdown(found, scale, confidence=confidence), "csv": to_csv(found)}
    return write_beside(results / "claims" / scale, contents)
