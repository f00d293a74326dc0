"""A thesis table from records: Markdown, LaTeX, CSV and plain text.

A table is data: rows, columns and the run behind each cell. Every cell knows its runs, so that a number can be
followed to its records, and an empty cell says how to fill itself.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from gradexp.report import provenance
from gradexp.report.specs import Planner, Source, at_paper, seeds_of
from gradexp.runs import ROOT, Config, Paths, read_record, write_atomically

EMPTY = "–"
COLUMNS = ("row", "column", "metric", "ours", "std", "n", "thesis", "difference", "run_ids")


@dataclass(frozen=True)
class Thesis:
    """A number that the thesis prints, with its standard deviation where it prints one."""

    value: float
    bold: bool
    std: float | None = None

    def __str__(self) -> str:
        return f"{self.value:g}" + ("" if self.std is None else f" ± {self.std:g}")


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    sources: tuple[Source, ...]
    thesis: Thesis | None
    comparable: bool
    metric: str
    values: tuple[float, ...]  # of the finished runs, in the order of the seeds; NaN where one diverged
    spreads: tuple[float, ...] = ()  # standard deviations inside each run (over draws or images), where the table shows these
    best: bool = False
    others: tuple[Cell, ...] = ()  # further metrics of the same runs, shown in the same place: accuracy / GAN-test

    @property
    def parts(self) -> tuple[Cell, ...]:
        """The cell's metrics; the last one decides which cell is best."""
        return (self, *self.others)

    @property
    def ours(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation inside the runs where the table shows that; otherwise over seeds, of the sample."""
        if self.spreads:
            return math.sqrt(statistics.fmean(spread**2 for spread in self.spreads))
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) if all(map(math.isfinite, self.values)) else math.nan  # some run diverged

    @property
    def difference(self) -> float | None:
        if self.ours is None or self.thesis is None or not self.comparable:
            return None
        difference = self.ours - self.thesis.value
        return difference if math.isfinite(difference) else None

    @property
    def missing(self) -> list[Source]:
        return [source for source in self.sources if not source.finished]


@dataclass(frozen=True)
class Table:
    number: str
    title: str
    corner: str
    scale: str
    caption: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    best_per: str = "column"
    departures: tuple[tuple[str, str, str], ...] = ()  # every (setting, here, at scale=paper)

    def cell(self, row: str, column: str) -> Cell:
        return next(cell for cell in self.cells if (cell.row, cell.column) == (row, column))

    @property
    def missing(self) -> list[Source]:
        return list(dict.fromkeys(source for cell in self.cells for source in cell.missing))


def value_of(record: Config, metric: str) -> float:
    """A record's metric; NaN for a diverged run."""
    value = record["metrics"].get(metric)
    return float("nan") if value is None else float(value)


def values_of(sources: Iterable[Source], metric: str) -> tuple[float, ...]:
    return tuple(value_of(read_record(source.record), metric) for source in sources if source.finished)


def read_thesis(path: Path) -> dict[tuple[str, ...], Thesis]:
    """results/thesis.csv as {(item, row, column): number}, and as {(item, row, column, quantity): number}."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    found: dict[tuple[str, ...], Thesis] = {}
    for x in lines:
        value = Thesis(float(x["value"]), x["bold"] == "1", float(x["std"]) if x["std"] else None)
        found[x["item"], x["row"], x["column"]] = found[x["item"], x["row"], x["column"], x["metric"]] = value
    return found


def mark_best(cells: Sequence[Cell], best: str | None, per: str = "column", apart: Sequence[str] = ()) -> tuple[Cell, ...]:
    """Bold as in the thesis: the best of each column (`row`, or whole `table`), where at least two of its cells are filled.

    best: `max`, `min`, or None for a table without bold numbers. apart: rows that do not compete, such as an oracle.
    """
    if best is None:
        return tuple(cells)
    pick = max if best == "max" else min
    groups: dict[str, list[float]] = {}
    for cell in cells:
        value = cell.parts[-1].ours
        if value is not None and value == value and cell.row not in apart:
            groups.setdefault(getattr(cell, per, ""), []).append(value)
    winners = {group: pick(numbers) for group, numbers in groups.items() if len(numbers) > 1}

    def wins(cell: Cell) -> bool:
        value = cell.parts[-1].ours
        return value is not None and cell.row not in apart and value == winners.get(getattr(cell, per, ""))

    return tuple(replace(cell, best=wins(cell)) for cell in cells)


# --- from a spec to a table -------------------------------------------------------------------------------


def overrides_of(spec: Config, row: Config, column: Config, scale: str, seed: int) -> list[str]:
    """What to type for one cell and one seed. A row or a column may name an experiment of its own."""
    experiment = [f"experiment={_setting('experiment', row, column, spec)}", f"scale={scale}"]
    return [*experiment, *row.get("overrides", []), *column.get("overrides", []), f"seed={seed}"]


def _setting(key: str, *places: Config) -> Any:
    """What the first place that has this key says."""
    return next((place[key] for place in places if key in place), None)


def cells_of(spec: Config, scale: str) -> Iterator[tuple[Config, Config, list[list[str]]]]:
    """(row, column, overrides of each seed) for all cells that the scale has.

    A scale listed under the spec's `only` runs nothing but the cells that it names there: the others stay empty.
    A column may have `seeds` of its own.
    """
    only = spec.get("only", {}).get(scale)
    columns = [column for column in spec["columns"] if scale in column.get("scales", spec["seeds"])]
    for row in spec["rows"]:
        for column in columns:
            wanted = only is None or [row["label"], column["label"]] in only
            seeds = _seeds(spec, column, scale) if wanted else []
            yield row, column, [overrides_of(spec, row, column, scale, seed) for seed in seeds]


def _seeds(spec: Config, column: Config, scale: str) -> list[int]:
    return list(column.get("seeds", {}).get(scale, seeds_of(spec, scale)))


def build(spec: Config, scale: str, plan: Planner, paths: Paths) -> Table:
    """The table that `conf/table/NUMBER.yaml` describes, filled with whatever records there are."""
    thesis = read_thesis(ROOT / "results" / "thesis.csv")

    cells = []
    pairs: list[tuple[Config, Config]] = []  # of each cell, here and at scale=paper
    data: set[str] = set()
    for row, column, seeds in cells_of(spec, scale):
        sources = tuple(Source.of(plan(overrides), paths) for overrides in seeds)
        names = [str(place.get("thesis", place["label"])) for place in (row, column)]
        settings = {key: _setting(key, row, column, spec) for key in ("metric", "spread", "thesis_metric")}
        metrics, quantities = _listed(settings["metric"]), _listed(settings["thesis_metric"])
        spreads = values_of(sources, settings["spread"]) if settings["spread"] else ()
        parts = [
            Cell(
                row=row["label"],
                column=column["label"],
                sources=sources,
                thesis=thesis.get(
                    (spec["thesis"] if "thesis" in spec else spec["number"], *names, *([quantity] if quantity else []))
                ),
                comparable=scale in spec["comparable"],
                metric=metric,
                values=values_of(sources, metric),
                spreads=spreads,
            )
            for metric, quantity in zip_longest(metrics, quantities)
        ]
        cells.append(replace(parts[0], others=tuple(parts[1:])))
        if not seeds:
            continue
        config = plan(seeds[0]).config
        pairs.append((config, plan(at_paper(seeds[0], scale)).config))
        data.add(config["data"]["name"])
    departed = provenance.departed(pairs)
    apart = [row["label"] for row in spec["rows"] if row.get("apart")]
    lines = [line for line in spec.get("upstream", []) if scale in line.get("scales", spec["seeds"])]
    upstream = [(line, Source.of(plan([*line["overrides"], f"scale={scale}"]), paths)) for line in lines]
    missing = any(cell.missing for cell in cells)
    caption = [
        *(text for text in (spec.get("note"), spec.get("notes", {}).get(scale)) if text),
        *(["Cells marked – are not part of this scale."] if scale in spec.get("only", {}) else []),
        *([f"Its empty cells need {spec['needs'][scale]}."] if missing and scale in spec.get("needs", {}) else []),
        provenance.departure_sentence(scale, departed, tuple(spec.get("told", ()))),
        *(_upstream_sentence(line, run, spec, thesis) for line, run in upstream),
        *(
            []
            if scale in spec["comparable"]
            else ["The thesis's numbers mark their places; at this scale they can't be compared."]
        ),
        _seed_sentence(spec, scale),
        provenance.origins(
            [read_record(file) for file in dict.fromkeys(s.record for c in cells for s in c.sources if s.finished)]
        ),
    ]
    return Table(
        number=spec["number"],
        title=spec["title"].format(data=", ".join(sorted(data)), where=spec.get("where", {}).get(scale)),
        corner=spec["corner"],
        scale=scale,
        caption=tuple(caption),
        rows=tuple(row["label"] for row in spec["rows"]),
        columns=tuple(dict.fromkeys(cell.column for cell in cells)),
        cells=mark_best(cells, spec["best"], spec.get("best_per", "column"), apart),
        best_per=spec.get("best_per", "column"),
        departures=tuple((key, *values) for key, values in departed.items()),
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _seed_sentence(spec: Config, scale: str) -> str:
    own = [column for column in spec["columns"] if scale in column.get("seeds", {})]
    listed = [f"column {column['label']}: {provenance.enumerated(_seeds(spec, column, scale))}" for column in own]
    exceptions = f" ({'; '.join(listed)})" if listed else ""
    return f"Seeds: {provenance.enumerated(seeds_of(spec, scale))}{exceptions}. The test set is read once, after the last step."


def _upstream_sentence(line: Config, source: Source, spec: Config, thesis: dict[tuple[str, ...], Thesis]) -> str:
    found = values_of([source], line.get("metric", "test/accuracy"))
    mine = f"{found[0]:.2f} (run {source.id})" if found else "not run yet"
    printed = thesis.get((spec["thesis"] if "thesis" in spec else spec["number"], *line["thesis"]))
    return f"{line['label'].capitalize()}: {mine}" + (f"; the thesis's {printed.value:g}." if printed else ".")


# --- formats ----------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    return EMPTY if value is None else "NaN" if value != value else f"{value:.2f}"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}".replace("-", "−")


def ours(cell: Cell) -> str:
    """Mean, ± standard deviation over seeds, and their number where the table has several; all metrics of the cell."""
    if cell.others and not cell.values:
        return EMPTY
    count = f" (n={len(cell.values)})" if cell.values and len(cell.sources) > 1 else ""
    return " / ".join(number(c.ours) + (f" ± {c.std:.2f}" if c.std is not None else "") for c in cell.parts) + count


def printed(cell: Cell) -> str:
    """The thesis's number, or numbers; '' where it prints none."""
    return " / ".join(str(part.thesis) for part in cell.parts if part.thesis)


def gap(cell: Cell) -> str:
    """Ours minus the thesis's, where they may be compared."""
    return " / ".join(signed(part.difference) for part in cell.parts if part.difference is not None)


def to_csv(table: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for c in (part for cell in table.cells for part in cell.parts):
        done = [source.id for source in c.sources if source.finished]
        plain = [("" if x is None else f"{x:.4f}") for x in (c.ours, c.std)]
        thesis = "" if c.thesis is None else f"{c.thesis.value:g}"
        difference = "" if c.difference is None else f"{c.difference:.4f}"
        writer.writerow([c.row, c.column, c.metric, *plain, len(c.values), thesis, difference, " ".join(done)])
    return out.getvalue()


def to_markdown(table: Table) -> str:
    def cell(c: Cell) -> str:
        mine = f"**{ours(c)}**" if c.best else ours(c)
        if c.thesis is None:
            return mine
        theirs = f"**{printed(c)}**" if c.thesis.bold else printed(c)
        return f"{mine}<br>thesis {theirs}" + (f" ({gap(c)})" if gap(c) else "")

    lines = [f"**Table {table.number}, scale={table.scale}.** {table.title}", ""]
    lines += ["| " + " | ".join([table.corner, *table.columns]) + " |", "|---" * (len(table.columns) + 1) + "|"]
    lines += [
        "| " + " | ".join([row, *(cell(table.cell(row, column)) for column in table.columns)]) + " |" for row in table.rows
    ]
    lines += ["", *(f"- {sentence}" for sentence in table.caption)]
    filled = [(c, s) for c in table.cells for s in c.sources if s.finished]
    if filled:
        lines += ["", "<details><summary>Records</summary>", "", "| row | column | records |", "|---|---|---|"]
        for c in table.cells:
            links = [f"[{s.id}](../../runs/{s.record.parent.name}/{s.record.name})" for s in c.sources if s.finished]
            if links:
                lines.append(f"| {c.row} | {c.column} | {' '.join(links)} |")
        lines += ["", "</details>"]
    if table.missing:
        lines += ["", "Missing runs:", "", "```", *(source.command for source in table.missing), "```"]
    return "\n".join(lines) + "\n"


LATEX = str.maketrans(
    {"β": r"$\beta$", "λ": r"$\lambda$", "μ": r"$\mu$", "σ": r"$\sigma$", "Δ": r"$\Delta$", "ℓ": r"$\ell$", "×": r"$\times$"}
    | {"→": r"$\rightarrow$", "↓": r"$\downarrow$", "−": "$-$", "±": r"$\pm$", "–": "--"}
)


def to_latex(table: Table) -> str:
    def text(words: str) -> str:
        for plain, escaped in (("\\", r"\textbackslash "), *((x, "\\" + x) for x in "&%$#_{}")):
            words = words.replace(plain, escaped)
        return words.translate(LATEX)

    def cell(c: Cell) -> str:
        mine = text(ours(c))
        mine = rf"\textbf{{{mine}}}" if c.best else mine
        if c.thesis is None:
            return mine
        theirs = rf"\textbf{{{text(printed(c))}}}" if c.thesis.bold else text(printed(c))
        return f"{mine} ({theirs})"

    body = [
        " & ".join([text(row), *(cell(table.cell(row, column)) for column in table.columns)]) + r" \\" for row in table.rows
    ]
    caption = " ".join([text(table.title), "In parentheses: the thesis.", *(text(x.replace("`", "")) for x in table.caption)])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
            r"\toprule",
            " & ".join([text(table.corner), *map(text, table.columns)]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_text(table: Table) -> str:
    """For the terminal: ours above, the thesis's number below in parentheses; * marks the best of a column."""
    heads = [table.corner, *table.columns]
    lines: list[list[str]] = []
    for row in table.rows:
        cells = [table.cell(row, column) for column in table.columns]
        lines.append([row, *(ours(c) + ("*" if c.best else "") for c in cells)])
        if any(c.thesis for c in cells):
            lines.append(["", *(f"({printed(c)})" if c.thesis else "" for c in cells)])
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    shown = [
        line[0].ljust(widths[0]) + "".join("  " + x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))
        for line in [heads, *lines]
    ]
    rule = "-" * len(shown[0])
    body = [f"Table {table.number}, scale={table.scale}. {table.title}", rule, shown[0], rule, *shown[1:], rule]
    body += [f"* best of its {table.best_per}; in parentheses: the thesis's number", *table.caption]
    if table.missing:
        body += ["", "Missing runs:", *(f"  {source.command}" for source in table.missing)]
    return "\n".join(body) + "\n"


def to_svg(table: Table) -> str:
    """A picture for pages: ours in front, the thesis's number dim behind it."""
    grid = rich.table.Table(title=f"Table {table.number}, scale={table.scale}. {table.title}", box=rich.box.HORIZONTALS)
    grid.add_column(table.corner)
    for column in table.columns:
        grid.add_column(column, justify="right")
    for row in table.rows:
        grid.add_row(row, *(_styled(table.cell(row, column)) for column in table.columns))
    console = rich.console.Console(record=True, width=100, file=io.StringIO())
    console.print(grid)
    console.print(f"bold: best of its {table.best_per}; dim: the thesis", style="dim", justify="center")
    # The exporter's fonts come from the network; a picture in a repository must not need one.
    return re.sub(r"@font-face \{[^}]*\}\s*", "", console.export_svg(title="gradexp"))


def _styled(cell: Cell) -> str:
    mine = f"[bold]{ours(cell)}[/bold]" if cell.best else ours(cell)
    return f"{mine} [dim]{printed(cell)}[/dim]" if cell.thesis else mine


def write(table: Table, results: Path) -> list[Path]:
    """Writes the files of a table under results/tables/<scale>/."""
    stem = results / "tables" / table.scale / f"table_{table.number.replace('.', '_')}"
    files = {".md": to_markdown(table), ".csv": to_csv(table), ".tex": to_latex(table), ".svg": to_svg(table)}
    for suffix, content in files.items():
        write_atomically(stem.with_suffix(suffix), content.encode())
    return [stem.with_suffix(suffix) for suffix in files]
