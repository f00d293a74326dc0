"""One self-contained page of everything at one scale: tables, figures, claims, plan, bench, and the record behind each number.

It opens from disk, without network or server. What it shows of a record is data and never markup: JSON that the page's one
script writes as text, under a content security policy that runs no other script and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup, escape
from PIL import Image

from gradexp.base.files import write_atomically
from gradexp.engine.record import read_record
from gradexp.engine.run import ROOT, Config, Paths, Run
from gradexp.report import claims, figures, formats, provenance, tables
from gradexp.report.specs import Planner

PAGE = Path(__file__).with_name("page")


@dataclass(frozen=True)
class Mark:
    """How a cell stands to the thesis's number, told by colour, by sign and in words: "above", "the thesis's number"."""

    name: str
    sign: str
    words: str


CLOSE, ABOVE, BELOW, DIVERGED, APART, EMPTY, ABSENT = MARKS = (
    Mark("close", "≈", "to the thesis's number"),
    Mark("above", "▲", "the thesis's number"),
    Mark("below", "▼", "the thesis's number"),
    Mark("diverged", "✕", "in training"),
    Mark("apart", "·", "no number to set ours against, or a scale that can't be"),
    Mark("not run", "○", "yet: the cell holds the command"),
    Mark("absent", "", "not part of this scale"),
)
CLAIM_SIGNS = {"holds": "✓", "contradicted": "✕", "undecided": "?", "direction only": "→", "withheld": "–", "not run": "○"}


def mark(number: Any, close: float) -> Mark:
    """How a cell stands to the thesis's number. number: its last row of `Table.numbers`, which also decides which cell is best.

    close: the largest |ours − thesis| / |thesis| that counts as close; so does what lies within the standard deviation
    over runs that either number has (a deviation inside runs, over images or draws, is another matter).
    """
    if not number.planned:
        return ABSENT
    if not number.n:
        return EMPTY
    if math.isnan(number.ours):
        return DIVERGED
    if math.isnan(number.difference):
        return APART
    over_runs = [] if number.inside else [std for std in (number.std, number.thesis_std) if not math.isnan(std)]
    if abs(number.difference) <= max(close * abs(number.thesis), *over_runs, 0.0):
        return CLOSE
    return ABOVE if number.difference > 0 else BELOW


@dataclass(frozen=True)
class View:
    """What the template draws: a table or a figure, with the anchors of the panels that its cells or series open."""

    number: str
    table: tables.Table | None = None
    title: str = ""
    cells: dict[tuple[str, str], formats.Shown] = field(default_factory=dict)
    anchors: dict[Any, str] = field(default_factory=dict)  # by (row, column), or by series
    marks: dict[Any, Mark] = field(default_factory=dict)
    picture: str | None = None
    csv: tuple[str, str] | None = None  # of the plotted values: the file's name, its content as a data address
    missing: Sequence[Run] = ()
    told: Sequence[str] = ()  # the figure's caption
    stale: bool = False  # whether the picture was drawn from other runs

    @property
    def empty(self) -> int:
        return self.counts[EMPTY.name]

    @property
    def size(self) -> int:
        """Cells that this scale runs."""
        return len(self.marks) - self.counts[ABSENT.name]

    @property
    def caption(self) -> list[str]:
        """The figure's sentences; or the table's, but the one on its departures, which stand in a table of their own."""
        if self.table is None:
            return list(self.told)
        departs = provenance.DEPARTS.format(self.table.scale)
        return [sentence for sentence in self.table.caption if not sentence.startswith(departs)]

    @property
    def counts(self) -> Counter[str]:
        return Counter(one.name for one in self.marks.values())


@dataclass
class Chapter:
    number: str
    title: str
    tables: list[View]
    figures: list[View]
    claims: list[claims.Judged]


class Panels:
    """What cells open: entries (a cell, a series, a claim) and the records behind them, each record once."""

    def __init__(self, paths: Paths, commands: dict[str, str], points: int) -> None:
        self.paths, self.commands, self.points = paths, commands, points
        self.entries: dict[str, Config] = {}
        self.records: dict[str, Config] = {}
        self.pool: list[Any] = []
        self._places: dict[str, int] = {}

    def entry(self, anchor: str, kind: str, title: str, facts: Sequence[tuple[str, str]], runs: Iterable[Run]) -> str:
        """Adds what one link opens, and returns the link's anchor."""
        runs = list(runs)
        for run in runs:
            self.commands.setdefault(run.id, run.command)
            if run.finished:
                self._add(run.record_path)
        self.entries[anchor] = {
            "kind": kind,
            "title": title,
            "facts": facts,
            "runs": [run.id for run in runs if run.finished],
            "todo": [run.command for run in runs if not run.finished],
        }
        return anchor

    def _add(self, path: Path) -> None:
        """Adds a record and those of its upstream runs."""
        if path.stem in self.records or not path.exists():
            return
        record = self.records[path.stem] = read_record(path)
        for run in record.get("upstream", {}).values():
            self._add(self.paths.results / "runs" / run["experiment"] / f"{run['id']}.json")

    def packed(self) -> Config:
        """JSON-ready: curves thinned, equal parts of configs stored once."""
        records = {run: self._slim(record) for run, record in sorted(self.records.items())}
        return {"entries": self.entries, "records": records, "pool": self.pool}

    def _slim(self, record: Config) -> Config:
        metrics = record["metrics"]
        kept = {key: value for key, value in record.items() if key not in ("metrics", "curves_file")}
        return {
            **{key: self._intern(value) for key, value in kept.items()},
            "numbers": {name: value for name, value in metrics.items() if not isinstance(value, list)},
            "curves": {name: curve(value, self.points) for name, value in metrics.items() if isinstance(value, list)},
            "command": self.commands.get(record["id"]),
        }

    def _intern(self, value: Any) -> Any:
        """Dicts become {"$": place in the pool}: most configs differ in a few leaves."""
        if not isinstance(value, dict):
            return value
        content = {key: self._intern(item) for key, item in value.items()}
        text = json.dumps(content, sort_keys=True)
        if text not in self._places:
            self._places[text] = len(self.pool)
            self.pool.append(content)
        return {"$": self._places[text]}


def curve(values: Sequence[Any], points: int) -> Config:
    """A curve as at most `points` means of equal stretches, four digits each; null where a stretch has no number."""
    if not all(isinstance(value, int | float | None) for value in values):
        return {"n": len(values), "y": []}
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    stretches = np.array_split(numbers, min(points, len(numbers)) or 1)
    finite = [part[np.isfinite(part)] for part in stretches]
    return {"n": len(values), "y": [float(f"{part.mean():.4g}") if len(part) else None for part in finite]}


def remembering(plan: Planner, commands: dict[str, str]) -> Planner:
    """A planner that notes the shortest command of every run it plans, upstream runs included."""

    def note(run: Run) -> Run:
        commands[run.id] = min(commands.get(run.id, run.command), run.command, key=len)
        for below in run.upstream.values():
            note(below)
        return run

    return lambda overrides: note(plan(overrides))


# --- views ------------------------------------------------------------------------------------------------


def table_view(table: tables.Table, panels: Panels, close: float) -> View:
    last: Any = table.numbers.drop_duplicates(tables.CELL, keep="last").itertuples()
    marks = {(number.row, number.column): mark(number, close) for number in last}
    cells = formats.texts(table)
    metrics = table.numbers.groupby(tables.CELL)["metric"].agg(", ".join)
    anchors = {}
    for (row, column), cell in cells.items():
        standing = marks[row, column]
        facts = [
            ("ours", cell.ours if cell.n else ""),
            ("thesis", cell.thesis),
            ("difference", cell.gap),
            ("standing", f"{standing.sign} {standing.name}"),
            ("metric", str(metrics.loc[(row, column)])),
        ]
        anchor = f"cell-{table.number}-{table.rows.index(row)}-{table.columns.index(column)}"
        facts = [(label, text) for label, text in facts if text]
        anchors[row, column] = panels.entry(anchor, f"Table {table.number}", f"{row} · {column}", facts, cell.runs)
    return View(table.number, table, table.title, cells, anchors, marks, missing=table.missing)


def figure_view(spec: Config, series: Sequence[figures.Series], scale: str, panels: Panels, told: Sequence[str] = ()) -> View:
    """told: the figure's caption."""
    number = str(spec["number"])
    runs: dict[str, list[Run]] = {}
    for one in series:  # a series of several points is one to the reader
        runs.setdefault(one.label, []).extend(one.runs)
    anchors = {
        label: panels.entry(f"series-{number}-{i}", f"Figure {number}", label, [], some)
        for i, (label, some) in enumerate(runs.items())
    }
    stem = panels.paths.results / "figures" / scale / f"figure_{number.replace('.', '_')}"
    return View(
        number,
        title=str(spec["title"]),
        anchors=anchors,
        picture=picture(stem),
        csv=values(stem.with_suffix(".csv")),
        missing=figures.missing(series),
        told=told,
        stale=stale(stem.with_suffix(".md"), [run for some in runs.values() for run in some]),
    )


def stale(page: Path, runs: Iterable[Run]) -> bool:
    """Whether a figure's page, written with its picture, names other runs than these."""
    drawn = re.findall(r"/([0-9a-f]{12})\.json", page.read_text(encoding="utf-8")) if page.exists() else []
    return set(drawn) != {run.id for run in runs}


def claim_views(judged: Sequence[claims.Judged], panels: Panels) -> Sequence[claims.Judged]:
    """The claims, each with a panel of the runs that it compares."""
    for claim in judged:
        runs = dict.fromkeys(run for one in claim.comparisons for run in one.runs)
        panels.entry(f"claim-{claim.id}", f"Claim, {claim.item}", claim.says, [("verdict", claim.verdict)], runs)
    return judged


def picture(stem: Path) -> str | None:
    """The figure as a data address: its SVG where that is the smaller one, otherwise its PNG, compressed without loss."""
    found = {}
    if stem.with_suffix(".png").exists():
        found["png"] = _compressed(stem.with_suffix(".png"))
    if stem.with_suffix(".svg").exists():
        found["svg+xml"] = stem.with_suffix(".svg").read_bytes()
    if not found:
        return None
    kind = min(found, key=lambda name: len(found[name]))
    return f"data:image/{kind};base64,{base64.b64encode(found[kind]).decode()}"


def _compressed(path: Path) -> bytes:
    with Image.open(path) as image:
        opaque = image.convert("RGB") if "A" not in image.mode or image.getchannel("A").getextrema()[0] == 255 else image
        if opaque.mode == "RGB" and opaque.getcolors(256):
            opaque = opaque.quantize(256, dither=Image.Dither.NONE)  # a palette of all its colours: nothing is lost
        out = io.BytesIO()
        opaque.save(out, "png", optimize=True)
    return min(out.getvalue(), path.read_bytes(), key=len)


def values(path: Path) -> tuple[str, str] | None:
    return (path.name, f"data:text/csv;base64,{base64.b64encode(path.read_bytes()).decode()}") if path.exists() else None


# --- the page ---------------------------------------------------------------------------------------------


def settings() -> Config:
    """conf/report.yaml."""
    found: Config = yaml.safe_load((ROOT / "conf" / "report.yaml").read_text(encoding="utf-8"))
    return found


def chapters(
    tables_made: Sequence[View], figures_made: Sequence[View], judged: Sequence[claims.Judged], said: Config
) -> list[Chapter]:
    """By the first digit of a number; what has none stands in a last chapter of its own."""
    known = [*((str(one["number"]), one["title"]) for one in said["chapters"]), ("", "Beyond the thesis")]
    names = {number for number, _ in known}

    def belongs(number: str) -> str:
        return number[:1] if number[:1] in names else ""

    made = [
        Chapter(
            number,
            title,
            [view for view in tables_made if belongs(view.number) == number],
            [view for view in figures_made if belongs(view.number) == number],
            [claim for claim in judged if belongs(claim.chapter) == number],
        )
        for number, title in known
    ]
    return [chapter for chapter in made if chapter.tables or chapter.figures or chapter.claims]


def render(
    scale: str,
    parts: Sequence[Chapter],
    panels: Panels,
    said: Config,
    *,
    made_by: str,
    bench: Config | None = None,
    costs: Sequence[Config] = (),
    explanation: Sequence[str] = (),
) -> str:
    """The page. made_by: the version and commit that made it; explanation: of the claims' verdicts, in Markdown."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "tally": claims.tally,
        "summary": claims.summary,
        "detail": claims.detail,
        "verdict": claims.verdict,
    }
    environment.globals |= {"breakable_dot": Markup(".<wbr>"), "marks": MARKS, "claim_signs": CLAIM_SIGNS}
    environment.filters |= {"prose": lambda text: prose(text, panels), "markdown": markdown, "quantity": quantity}
    records = sorted(panels.records.values(), key=lambda record: (record["experiment"], record["id"]))
    return environment.get_template("page.html").render(
        scale=scale,
        said=said,
        chapters=parts,
        records=records,
        commands=panels.commands,
        bench=bench,
        costs=costs,
        explanation=explanation,
        made_by=made_by,
        origins=provenance.origins(records),
        data=embedded(panels.packed()),
        style=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def embedded(value: Any) -> Markup:
    """Compact JSON that can stand inside a script element whatever its strings say."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def prose(text: str, panels: Panels) -> Markup:
    """A caption's sentence: `code`, and (run ID) as a link to its record."""
    marked = re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text)))
    known = panels.records.keys()

    def link(found: re.Match[str]) -> str:
        return f'run <a href="#run-{found[1]}">{found[1]}</a>' if found[1] in known else found[0]

    return Markup(re.sub(r"run ([0-9a-f]{12})", link, marked))


def markdown(text: str) -> Markup:
    """A line of Markdown with strong and emphasised words."""
    strong = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", str(escape(text.removeprefix("- "))))
    return Markup(re.sub(r"\*([^*]+)\*", r"<em>\1</em>", strong))


def quantity(value: Any) -> str:
    """A measured number with three digits; words as they are."""
    if value is None:
        return formats.EMPTY
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(page: str, scale: str, results: Path) -> Path:
    """results/report/<scale>.html"""
    path = results / "report" / f"{scale}.html"
    write_atomically(path, page.encode())
    return path
