"""One self-contained page of everything at one scale: tables, figures, claims, plan, bench, and the record behind each number.

It opens from disk, without network or server. Records are embedded as JSON, which the page's script writes as text, never as
markup; a content security policy forbids all other scripts and every request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from gradexp.base.files import write_atomically
from gradexp.engine.record import read_record
from gradexp.engine.run import Config, Run
from gradexp.report import claims, figures, provenance, tables

PAGE = Path(__file__).with_name("page")


@dataclass
class Panels:
    """What the page's links open: entries (a cell, a series, a claim) by anchor, and the records that they show, by id."""

    points: int  # of a curve
    entries: dict[str, Config] = field(default_factory=dict)
    records: dict[str, Config] = field(default_factory=dict)

    def add(self, anchor: str, kind: str, title: str, facts: Config, runs: Iterable[Run]) -> str:
        """Add an entry with the records of its runs, and return its anchor."""
        runs = list(runs)
        for run in runs:
            if run.finished:
                self._add_record(run.record_path, dict(_commands(run)))
        self.entries[anchor] = {
            "kind": kind,
            "title": title,
            "facts": [(label, text) for label, text in facts.items() if text],
            "runs": [run.id for run in runs if run.finished],
            "todo": [run.command for run in runs if not run.finished],
        }
        return anchor

    def _add_record(self, path: Path, commands: dict[str, str]) -> None:
        """Add a record and those of its upstream runs, each with its command and with curves of at most `points` points."""
        if path.stem in self.records or not path.exists():
            return
        record = read_record(path)
        kept = {key: value for key, value in record.items() if key not in ("metrics", "curves_file")}
        curves = {name: value for name, value in record["metrics"].items() if isinstance(value, list)}
        self.records[path.stem] = {
            "command": commands.get(path.stem),
            **kept,
            "numbers": {name: value for name, value in record["metrics"].items() if name not in curves},
            "curves": {name: curve(value, self.points) for name, value in curves.items()},
        }
        for run in record.get("upstream", {}).values():
            self._add_record(path.parents[1] / run["experiment"] / f"{run['id']}.json", commands)


def _commands(run: Run) -> Iterable[tuple[str, str]]:
    yield run.id, run.command
    for below in run.upstream.values():
        yield from _commands(below)


def curve(values: Sequence[Any], points: int) -> Config:
    """A curve as at most `points` means of equal stretches, four digits each; null for a stretch without numbers."""
    if not all(isinstance(value, int | float | None) for value in values):
        return {"n": len(values), "y": []}
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    stretches = np.array_split(numbers, min(points, len(numbers)) or 1)
    finite = [part[np.isfinite(part)] for part in stretches]
    return {"n": len(values), "y": [float(f"{part.mean():.4g}") if len(part) else None for part in finite]}


# --- what the template shows ------------------------------------------------------------------------------


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


def table_view(table: tables.Table, panels: Panels, close: float) -> Config:
    """A table as the template shows it; each cell opens its records or its commands."""
    last = table.numbers.drop_duplicates(tables.CELL, keep="last")
    cells = table.texts.assign(mark=marks(last, close))
    rows: dict[str, list[Config]] = {row: [] for row in table.rows}
    records: Any = cells.reset_index().to_dict("records")
    for cell in records:
        row, column, runs = cell["row"], cell["column"], cell.pop("runs")
        facts = {"ours": cell["ours"] if cell["n"] else "", "thesis": cell["thesis"], "difference": cell["gap"]}
        facts |= {"compared with the thesis": cell["mark"], "metric": cell["metric"].replace(" / ", ", ")}
        anchor = f"cell-{table.number}-{table.rows.index(row)}-{table.columns.index(column)}"
        rows[row].append(cell | {"anchor": panels.add(anchor, f"Table {table.number}", f"{row} · {column}", facts, runs)})
    counts = Counter(cells["mark"])
    size = len(cells) - counts["absent"]
    return {"number": table.number, "table": table, "rows": rows, "counts": counts, "size": size, "missing": table.missing}


def figure_view(
    spec: Config, series: Sequence[figures.Series], scale: str, results: Path, panels: Panels, text: provenance.Caption
) -> Config:
    """A figure as the template shows it; each of its series opens its records."""
    number, runs = str(spec["number"]), figures.runs_of(series)
    stem = results / "figures" / scale / f"figure_{number.replace('.', '_')}"
    pictures = [found for kind in ("svg+xml", "png") if (found := embedded_file(stem, f"image/{kind}"))]
    return {
        "number": number,
        "title": spec["title"],
        "series": {
            label: panels.add(f"series-{number}-{i}", f"Figure {number}", label, {}, found)
            for i, (label, found) in enumerate(runs.items())
        },
        "picture": min(pictures, key=len, default=None),
        "csv": embedded_file(stem, "text/csv"),
        "missing": figures.missing(series),
        "text": text,
        "stale": stale(stem.with_suffix(".md"), [run for found in runs.values() for run in found]),
    }


def stale(page: Path, runs: Iterable[Run]) -> bool:
    """Whether a figure's Markdown page, written with its picture, names other runs than these."""
    drawn = re.findall(r"/([0-9a-f]{12})\.json", page.read_text(encoding="utf-8")) if page.exists() else []
    return set(drawn) != {run.id for run in runs}


def embedded_file(stem: Path, kind: str) -> str | None:
    """A file as a data URL; None if there is none. kind: its media type, which gives its suffix."""
    path = stem.with_suffix("." + kind.partition("/")[2].partition("+")[0])
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}" if path.exists() else None


def claim_views(judged: claims.Judged, panels: Panels) -> list[Config]:
    """Claims as the template shows them; each opens the records of the runs that it compares."""
    texts = claims.shown(judged).rename(columns={"verdict": "words", "p (Holm)": "p"})
    views: Any = texts.join(judged.claims[["item", "run", "verdict"]]).reset_index().to_dict("records")
    comparisons = claims.comparisons_shown(judged).groupby("claim")
    compared = judged.comparisons.groupby("id")["runs"]
    for view in views:
        name = view["id"]
        runs = dict.fromkeys(itertools.chain(*compared.get_group(name)))
        panels.add(f"claim-{name}", f"Claim, {view['item']}", view["claim"], {"verdict": view["verdict"]}, runs)
        view["details"] = comparisons.get_group(name).drop(columns="claim").to_numpy().tolist()
    return views


def chapters(
    table_views: Sequence[Config], figure_views: Sequence[Config], claim_views: Sequence[Config], settings: Config
) -> list[Config]:
    """The views by the first digit of their numbers; those of no chapter of the thesis come last."""
    titles = {str(chapter["number"]): chapter["title"] for chapter in settings["chapters"]} | {"": "Beyond the thesis"}
    found = {
        number: {"number": number, "title": title, "tables": [], "figures": [], "claims": []}
        for number, title in titles.items()
    }
    for kind, key, views in (
        ("tables", "number", table_views),
        ("figures", "number", figure_views),
        ("claims", "chapter", claim_views),
    ):
        for view in views:
            first = view[key][:1]
            found[first if first in titles else ""][kind].append(view)
    return [chapter for chapter in found.values() if chapter["tables"] or chapter["figures"] or chapter["claims"]]


# --- the page ---------------------------------------------------------------------------------------------


def render(
    scale: str,
    parts: Sequence[Config],
    panels: Panels,
    settings: Config,
    *,
    made_by: str,
    bench: Config | None = None,
    costs: Sequence[Config] = (),
    explanation: Sequence[str] = (),
) -> str:
    """The page. parts: chapters; made_by: version and commit of the code; explanation: how claims are judged, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": lambda text: prose(text, panels.records), "quantity": quantity}
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    records = sorted(panels.records.values(), key=lambda record: (record["experiment"], record["id"]))
    return environment.get_template("page.html").render(
        scale=scale,
        settings=settings,
        chapters=parts,
        records=records,
        bench=bench,
        costs=costs,
        explanation=explanation,
        made_by=made_by,
        tally=claims.tally,
        origin=provenance.origin_of(records).sentences,
        data=embedded_json({"entries": panels.entries, "records": {record["id"]: record for record in records}}),
        style=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def embedded_json(value: Any) -> Markup:
    """Compact JSON that can't end the script element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def prose(text: str, records: Config) -> Markup:
    """A line of Markdown with `code`, strong and emphasised words; runs with a record become links."""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text.removeprefix("- "))))
    marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
    marked = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", marked)

    def link(found: re.Match[str]) -> str:
        return f'run <a href="#run-{found[1]}">{found[1]}</a>' if found[1] in records else found[0]

    return Markup(re.sub(r"run ([0-9a-f]{12})", link, marked))


def quantity(value: Any) -> str:
    """A measured number with three digits; other values unchanged."""
    if value is None:
        return tables.EMPTY
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(page: str, scale: str, results: Path) -> Path:
    """Write results/report/<scale>.html."""
    path = results / "report" / f"{scale}.html"
    write_atomically(path, page.encode())
    return path
