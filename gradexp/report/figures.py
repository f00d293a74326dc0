"""A thesis figure from records: a vector PDF, a PNG, and the plotted values as CSV.

A figure is data, like a table: its series and the runs behind them, and the function in gradexp/report/draw/ that
draws them. A drawing function sees records only, never a model.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gradexp.base.errors import UserError
from gradexp.engine.record import metric_of, read_arrays
from gradexp.engine.run import Config, Run
from gradexp.report import provenance, specs
from gradexp.report.formats import links
from gradexp.report.specs import Planner, command, seeds_of
from gradexp.report.writing import markdown, write_beside

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "svg.hashsalt": "gradexp",
}
NOTE_WIDTH = 20  # characters of a line below a figure, for each inch of its width
NOTE_HEIGHT = 0.11  # inches a line
COLUMN_WIDTH = 3.4  # inches: one column of a two-column page
PAGE_WIDTH = 7.0  # inches: both
# Okabe and Ito's colour-blind safe palette.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class Series:
    """One line, bar or row of a figure: its entry in the spec, and its runs, one a seed."""

    spec: Config
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return str(self.spec["label"])

    @property
    def records(self) -> list[Config]:
        return [record for run in self.runs if (record := run.record())]

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        return [read_arrays(run.record_path) for run in self.runs if run.finished]

    def metric(self, name: str) -> np.ndarray:
        """A metric of every finished run, a curve as one row a run; NaN where a number is missing. (n,) or (n, length).

        The curve of a run that diverged ends early.
        """
        values = [metric_of(record, name) for record in self.records]
        longest = max((len(value) for value in values if isinstance(value, list)), default=0)
        if not longest:
            return np.array(values, dtype=float)
        curves = [value if isinstance(value, list) else [] for value in values]
        return np.array([[*curve, *[None] * (longest - len(curve))] for curve in curves], dtype=float)

    def band(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (of the sample; 0 for a single run) of a curve over runs. Twice (length,)."""
        values = self.metric(name)
        if values.ndim < 2:
            raise UserError(f"{self.label}: {name} is a number, where a curve is wanted")
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


Row = dict[str, Any]
# spec, its series -> the drawing, and the plotted values as rows of the CSV file
Draw = Callable[[Config, Sequence[Series]], tuple[Figure, list[Row]]]


def gather(spec: Config, scale: str, plan: Planner) -> list[Series]:
    """The figure's series with whatever records there are; a series with points is one series for each."""
    found = specs.cells(spec, scale)
    return [Series({**series, **point}, tuple(map(plan, seeds.values()))) for series, point, seeds in found]


def caption(spec: Config, scale: str, series: Sequence[Series], plan: Planner) -> tuple[str, ...]:
    """What is to be known of the figure's runs: where their protocol departs from the paper's, their seeds, their origin."""
    first = seeds_of(spec, scale)[0]
    twins = [[command(spec, row, x, where, first) for where in (scale, "paper")] for row, x, _ in specs.cells(spec, scale)]
    departed = provenance.departed((plan(here).config, plan(paper).config) for here, paper in twins)
    return (
        *_notes(spec, scale),
        *([f"Its runs need {spec['needs'][scale]}."] if missing(series) and scale in spec.get("needs", {}) else []),
        provenance.departure_sentence(scale, departed),
        f"Seeds: {provenance.enumerated(seeds_of(spec, scale))}.",
        provenance.origins(*provenance.read(run for one in series for run in one.runs)),
    )


def _notes(spec: Config, scale: str) -> list[str]:
    """What the spec says of the figure, and of the figure at this scale."""
    return [text for text in (spec.get("note"), spec.get("notes", {}).get(scale)) if text]


def missing(series: Sequence[Series]) -> list[Run]:
    return [run for one in series for run in one.runs if not run.finished]


def make(
    spec: Config, scale: str, series: Sequence[Series], draw: Draw, results: Path, sentences: Sequence[str] = ()
) -> list[Path]:
    """Draws and writes the figure's files under results/figures/<scale>/. Raises UserError while runs are missing.

    sentences: the `caption` of the Markdown file that shows the picture. The thesis's own numbers are drawn at the spec's
    `comparable` scales only.
    """
    absent = missing(series)
    if absent:
        commands = "\n".join(f"  {run.command}" for run in absent)
        needs = f", which need {spec['needs'][scale]}" if scale in spec.get("needs", {}) else ""
        raise UserError(f"figure {spec['number']}, scale={scale}: runs are missing{needs}; make them with\n{commands}")
    comparable = scale in spec.get("comparable", [scale])
    shown = {key: value for key, value in spec.items() if comparable or key not in ("thesis", "lines")}
    with mpl.rc_context(STYLE):
        figure, rows = draw(shown, series)
        small = {"fontsize": 6.5, "color": "#555555", "x": 0.01, "ha": "left", "ma": "left"}
        below = _below(spec, scale, figure.get_figwidth())
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + NOTE_HEIGHT * len(below))
        figure.supxlabel("\n".join(below), **small)
        stem = results / "figures" / scale / f"figure_{spec['number'].replace('.', '_')}"
        pictures = {kind: _saved(figure, kind) for kind in ("png", "pdf", *spec.get("also", []))}
    values = pd.DataFrame(rows).to_csv(index=False)
    return write_beside(stem, {**pictures, "csv": values, "md": to_markdown(spec, scale, series, sentences)})


def _below(spec: Config, scale: str, width: float) -> list[str]:
    """The lines below a picture: its notes, and what a copy of the picture alone must still say."""
    seeds = seeds_of(spec, scale)
    origin = f"scale={scale}, seed{'s' * (len(seeds) > 1)} {provenance.enumerated(seeds)}"
    return [*itertools.chain(*(textwrap.wrap(note, int(NOTE_WIDTH * width)) for note in _notes(spec, scale))), origin]


def to_markdown(spec: Config, scale: str, series: Sequence[Series], sentences: Sequence[str]) -> str:
    number, title = spec["number"], spec.get("title", "")
    picture = f"![Figure {number} at scale={scale}](figure_{number.replace('.', '_')}.png)"
    lines = [f"**Figure {number}, scale={scale}.** {title}", "", picture, "", *(f"- {sentence}" for sentence in sentences)]
    runs: dict[str, dict[Run, None]] = {}
    for one in series:  # a series of several points is one to the reader
        runs.setdefault(one.label, {}).update(dict.fromkeys(one.runs))
    records = pd.DataFrame([(label, links(list(some))) for label, some in runs.items()], columns=["series", "records"])
    return "\n".join([*lines, "", "<details><summary>Records</summary>", "", *markdown(records), "", "</details>", ""])


def _saved(figure: Figure, kind: str) -> bytes:
    """The picture without dates and versions: the same records give the same bytes on any day."""
    content, left_out = io.BytesIO(), {"png": "Software", "pdf": "CreationDate"}.get(kind, "Date")
    figure.savefig(content, format=kind, metadata={left_out: None})
    return content.getvalue()
