"""One self-contained page of everything at one scale: tables, figures, claims, plan, bench, and the record behind each number.

It opens from disk, without network or server. Records are embedded as JSON, which the page's script writes as text, never as
markup; a content security policy forbids all other scripts and every request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from markupsafe import Markup

from gradexp.engine.record import Record, numbers_of
from gradexp.engine.run import Run
from gradexp.report import claims, figures, provenance, tables
from gradexp.report.specs import FigureSpec, ReportSettings
from gradexp.report.unshown import Unshown
from gradexp.report.writing import PAGES, rendered, stem_of

View = dict[str, Any]  # what a template shows


@dataclass
class Panels:
    """What the page's links open: entries (a cell, a series, a claim) by anchor, and the records that they show, by id."""

    points: int  # of a curve
    entries: dict[str, View] = field(default_factory=dict)
    records: dict[str, View] = field(default_factory=dict)

    def add(self, anchor: str, kind: str, title: str, facts: View, runs: Iterable[Run]) -> None:
        """Add an entry with the records of its runs and of those upstream."""
        runs = list(runs)
        finished = [run for run in runs if run.finished]
        for run in provenance.with_upstream(finished):
            if record := run.record():
                self.records[run.id] = _record_view(record, self.points) | {"command": run.command}
        shown = [(label, text) for label, text in facts.items() if text]
        todo = [run.command for run in runs if not run.finished]
        self.entries[anchor] = {
            "kind": kind,
            "title": title,
            "facts": shown,
            "runs": [run.id for run in finished],
            "todo": todo,
        }


def _record_view(record: Record, points: int) -> View:
    """A record with its numbers apart from its curves, which have at most `points` points."""
    return {
        **{key: value for key, value in record.items() if key not in ("metrics", "curves_file")},
        "numbers": numbers_of(record),
        "curves": {name: curve(value, points) for name, value in record["metrics"].items() if isinstance(value, list)},
    }


def curve(values: Sequence[Any], points: int) -> View:
    """A curve as at most `points` means of equal stretches, four digits each; null for a stretch without numbers."""
    stretches = np.array_split(np.array(values, dtype=float), min(points, len(values)) or 1)
    finite = [part[np.isfinite(part)] for part in stretches]
    return {"n": len(values), "y": [float(f"{part.mean():.4g}") if len(part) else None for part in finite]}


def marks(numbers: pd.DataFrame, close: float) -> np.ndarray:
    """How cells compare with the thesis's numbers, as the name of a mark; numbers: rows of Table.numbers.

    close: the largest |ours - thesis| / |thesis| that counts as close. A difference within the standard deviation over runs
    of either number is close, too; a deviation inside runs, over images or draws, does not count.
    """
    deviation = numbers[["std", "thesis_std"]].max(axis=1).where(~numbers["inside"]).fillna(0)
    conditions = {
        "absent": numbers["planned"] == 0,
        "not run": numbers["n"] == 0,
        "diverged": numbers["ours"].isna(),
        "apart": numbers["difference"].isna(),
        "close": numbers["difference"].abs() <= np.maximum(close * numbers["thesis"].abs(), deviation),
        "above": numbers["difference"] > 0,
    }
    return np.select(list(conditions.values()), list(conditions), "below")


def table_view(table: tables.Table, panels: Panels, close: float) -> View:
    """A table as the template shows it; each cell opens its records or its commands."""
    last = table.numbers.drop_duplicates(tables.CELL, keep="last")
    named = iter(marks(last, close))
    rows = {row: [cell | {"mark": next(named)} for cell in cells] for row, cells in table.by_row.items()}
    for cell in itertools.chain(*rows.values()):
        row, column = cell["row"], cell["column"]
        facts = {"ours": cell["ours"] if cell["n"] else "", "thesis": cell["thesis"], "difference": cell["gap"]}
        facts |= {"compared with the thesis": cell["mark"], "metric": cell["metric"].replace(" / ", ", ")}
        cell["anchor"] = f"cell-{table.number}-{table.rows.index(row)}-{table.columns.index(column)}"
        panels.add(cell["anchor"], f"Table {table.number}", f"{row} · {column}", facts, cell["runs"])
    counts = Counter(cell["mark"] for cell in itertools.chain(*rows.values()))
    size = counts.total() - counts["absent"]
    sentences = sorted_sentences(table.caption)
    return {"number": table.number, "table": table, "rows": rows, "counts": counts, "size": size} | sentences


def sorted_sentences(caption: provenance.Caption) -> View:
    """A caption's sentences as `notes`, which the page shows, and `origin`, about its runs, which it folds."""
    notes = [sentence for sentence in caption.sentences if sentence not in caption.origin]
    details = [detail for detail in caption.details if not detail.startswith("Departures ")]  # the page has a table of them
    return {"notes": notes, "origin": [*caption.origin, *details], "departures": caption.departures}


def figure_view(
    spec: FigureSpec, series: Sequence[figures.Series], scale: str, results: Path, panels: Panels, caption: provenance.Caption
) -> View:
    """A figure as the template shows it; each of its series opens its records."""
    number, runs = str(spec["number"]), figures.runs_of(series)
    stem = stem_of("figure", number, scale, results)
    pictures = [found for kind in ("svg+xml", "png") if (found := embedded_file(stem, f"image/{kind}"))]
    anchors = {label: f"series-{number}-{i}" for i, label in enumerate(runs)}
    for label, anchor in anchors.items():
        panels.add(anchor, f"Figure {number}", label, {}, runs[label])
    return {
        "number": number,
        "title": spec["title"],
        "series": anchors,
        "picture": min(pictures, key=len, default=None),
        "csv": embedded_file(stem, "text/csv"),
        "missing": figures.missing(series),
        "partial": bool(figures.waiting(spec, series)),
        "size": len(series),
        "done": sum(all(run.finished for run in one.runs) for one in series),
        "stale": stale(stem.with_suffix(".md"), itertools.chain(*runs.values())),
        **sorted_sentences(caption),
    }


def stale(page: Path, runs: Iterable[Run]) -> bool:
    """Whether a figure's Markdown page, written with its picture, names other runs than the finished ones of these."""
    drawn = re.findall(r"/([0-9a-f]{12})\.json", page.read_text(encoding="utf-8")) if page.exists() else []
    return set(drawn) != {run.id for run in runs if run.finished}


def embedded_file(stem: Path, kind: str) -> str | None:
    """A file as a data URL; None if there is none. kind: its media type, which gives its suffix."""
    path = stem.with_suffix("." + kind.partition("/")[2].partition("+")[0])
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None


def claim_views(judged: claims.Judged, panels: Panels) -> list[View]:
    """Claims as the template shows them; each opens the records of the runs that it compares.

    standing: the verdict, or `mixed` for a claim that is not tested and whose comparisons disagree.
    """
    views = claims.views(judged)
    for view in views:
        view["standing"] = "mixed" if ": mixed" in view["words"] else view["verdict"]
        runs = dict.fromkeys(itertools.chain(*(row["runs"] for row in view["details"])))
        panels.add(f"claim-{view['id']}", f"Claim, {view['item']}", view["claim"], {"verdict": view["verdict"]}, runs)
    return views


def chapters(views: Mapping[str, Sequence[View]], settings: ReportSettings) -> list[View]:
    """The views (`tables`, `figures`, `claims`) by the chapter of their numbers; those of no chapter come last."""
    titles = {str(chapter["number"]): chapter["title"] for chapter in settings["chapters"]} | {"": "Beyond the thesis"}
    parts: dict[str, View] = {
        number: {"number": number, "title": title, **{kind: [] for kind in views}} for number, title in titles.items()
    }
    for kind, view in ((kind, view) for kind, listed in views.items() for view in listed):
        first = str(view["chapter"] if kind == "claims" else view["number"])[:1]
        parts[first if first in titles else ""][kind].append(view)
    return [part for part in parts.values() if any(part[kind] for kind in views)]


def render(
    scale: str,
    views: Mapping[str, Sequence[View]],
    panels: Panels,
    settings: ReportSettings,
    *,
    made_by: str,
    bench: Sequence[View] = (),
    costs: Sequence[View] = (),
    explanation: Mapping[str, Sequence[str]] = {},
    findings: Mapping[str, Sequence[str]] = {},
    unshown: Sequence[Unshown] = (),
) -> str:
    """The page. views: as for `chapters`; made_by: version and commit of the code; explanation: of verdicts, in Markdown;
    findings: of chapters, in Markdown."""
    script = (PAGES / "page.js").read_text(encoding="utf-8")
    records = sorted(panels.records.values(), key=lambda record: (record["experiment"], record["id"]))
    return rendered(
        "page.html",
        scale=scale,
        settings=settings,
        chapters=chapters(views, settings),
        records=records,
        bench=bench,
        costs=costs,
        explanation=explanation,
        findings=findings,
        unshown=unshown,
        made_by=made_by,
        origin=provenance.origin_of(cast(list[Record], records)).sentences,
        data={"entries": panels.entries, "records": {record["id"]: record for record in records}},
        style=Markup((PAGES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
