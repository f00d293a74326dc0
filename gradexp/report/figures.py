"""A figure of the thesis from records: PNG, PDF, the plotted values as CSV, and a Markdown page with its caption.

A spec lists the series, the runs behind them, and the function in gradexp/report/draw/ that draws them. Drawing functions see
records only, never a model.
"""

from __future__ import annotations

import hashlib
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any, NotRequired, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gradexp.base.errors import MissingError, UserError
from gradexp.base.files import sha256, write_atomically
from gradexp.engine.plugins import packages
from gradexp.engine.record import Record, curves_path, metric_of, read_arrays
from gradexp.engine.run import ROOT, Run
from gradexp.report import provenance, specs
from gradexp.report.specs import FigureSpec, Planner, SeriesSpec, seeds_of
from gradexp.report.writing import csv, rendered, stem_of, write_beside

STYLE = mpl.rc_params_from_file(Path(__file__).with_name("draw") / "gradexp.mplstyle", use_default_template=False)
PALETTE = STYLE["axes.prop_cycle"].by_key()["color"]
COLUMN_WIDTH = 3.4  # inches: one column of a two-column page
NOTE_WIDTH = 20  # characters of a line below a figure, for each inch of its width
NOTE_HEIGHT = 0.11  # inches a line


class SeriesAt(SeriesSpec):
    x: NotRequired[float]  # of one of its points


@dataclass(frozen=True)
class Series:
    """One line, bar or row of a figure: its entry in the spec, and its runs, one for each seed."""

    spec: SeriesAt
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        return str(self.spec["label"])

    @property
    def records(self) -> list[Record]:
        return [record for run in self.runs if (record := run.record())]

    @property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        return [read_arrays(run.record_path) for run in self.runs if run.finished]

    def metric(self, name: str) -> np.ndarray:
        """A metric of every finished run, (n,), or a curve, (n, length).

        NaN for missing numbers, also after the end of the curve of a diverged run.
        """
        values = [metric_of(record, name) for record in self.records]
        if any(isinstance(value, list) for value in values):
            return pd.DataFrame([value if isinstance(value, list) else [] for value in values]).to_numpy(dtype=float)
        return np.array(values, dtype=float)

    def band(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sample standard deviation of a curve over runs (NaN for a single run), (length,) each."""
        values = self.metric(name)
        if values.ndim < 2:
            raise UserError(f"{self.label}: expected a curve, but {name} is a number")
        return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


Row = dict[str, Any]
# (spec, series) -> (figure, plotted values as rows of the CSV file)
Draw = Callable[[FigureSpec, Sequence[Series]], tuple[Figure, list[Row]]]


def gather(spec: FigureSpec, scale: str, plan: Planner) -> list[Series]:
    """The figure's series with the records that exist; a series with points becomes one Series for each point."""
    cells = specs.cells(spec, scale)
    return [Series(cast(SeriesAt, {**row, **point}), tuple(map(plan, seeds.values()))) for row, point, seeds in cells]


def runs_of(series: Sequence[Series]) -> dict[str, list[Run]]:
    """{label: runs}; the points of a series share its label."""
    runs: dict[str, list[Run]] = {}
    for one in series:
        runs.setdefault(one.label, []).extend(run for run in one.runs if run not in runs.get(one.label, []))
    return runs


def missing(series: Sequence[Series]) -> list[Run]:
    return [run for one in series for run in one.runs if not run.finished]


def waiting(spec: FigureSpec, series: Sequence[Series]) -> list[str]:
    """The labels that a figure is drawn without, as their runs are missing; empty if none is, or it can't be drawn yet."""
    labels = list(dict.fromkeys(one.label for one in series if missing([one])))
    return labels if spec.get("partial") and not missing([one for one in series if one.label == series[0].label]) else []


def caption(spec: FigureSpec, scale: str, series: Sequence[Series], plan: Planner) -> provenance.Caption:
    """The caption of a figure; series: as gathered from `spec`."""
    found = provenance.caption(spec, scale, [run for one in series for run in one.runs], plan)
    left_out = [f"Not run yet: {'; '.join(labels)}."] if (labels := waiting(spec, series)) else []
    return found._replace(sentences=[*left_out, *found.sentences])


def make(
    spec: FigureSpec,
    scale: str,
    series: Sequence[Series],
    draw: Draw,
    results: Path,
    text: provenance.Caption | None = None,
) -> list[Path]:
    """Draw the figure and write its files to results/figures/<scale>/. Raises MissingError if runs are missing (see `waiting`).

    text: the caption of the Markdown page. The thesis's own numbers are drawn only at the spec's `comparable` scales.
    """
    left_out = waiting(spec, series)
    shown = [one for one in series if one.label not in left_out]
    if absent := missing(shown):
        commands = "\n".join(f"  {run.command}" for run in absent)
        needs = f" (they need {spec['needs'][scale]})" if scale in spec.get("needs", {}) else ""
        raise MissingError(f"figure {spec['number']}, scale={scale}: runs are missing{needs}; run\n{commands}")
    comparable = scale in spec.get("comparable", [scale])
    drawn = cast(FigureSpec, {key: value for key, value in spec.items() if comparable or key not in ("thesis", "lines")})
    with mpl.rc_context(STYLE):
        figure, rows = draw(drawn, shown)
        lines = _below(spec, scale, left_out, figure.get_figwidth())
        figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + NOTE_HEIGHT * len(lines))
        figure.supxlabel("\n".join(lines), fontsize=6.5, color="#555555", x=0.01, ha="left", ma="left")
        pictures = {kind: _saved(figure, kind) for kind in ("png", "pdf", *spec.get("also", []))}
    page = to_markdown(spec, scale, series, text or provenance.Caption([], []))
    return write_beside(
        stem_of("figure", spec["number"], scale, results), {**pictures, "csv": csv(pd.DataFrame(rows)), "md": page}
    )


def make_once(
    spec: FigureSpec, scale: str, series: Sequence[Series], draw: Draw, results: Path, text: provenance.Caption, *, cache: Path
) -> list[Path]:
    """As `make`, but a figure whose files are those of the same records, texts and code is not drawn again.

    cache: folder with a list of the files' digests for each figure.
    """
    stem = stem_of("figure", spec["number"], scale, results)
    kept = cache / "figures" / f"{sha256_of(str(stem))}.json"
    paths = [run.record_path for one in series for run in one.runs if run.finished]  # records hold the digests of arrays
    records = [sha256(file) for path in paths for file in (path, curves_path(path)) if file.exists()]
    code = [*_sources(), *(file for folder in packages().values() for file in sorted(folder.rglob("*.py")))]
    state = sha256_of([spec, scale, text, records, [sha256(file) for file in code], mpl.__version__])
    with suppress(OSError, ValueError):
        before = json.loads(kept.read_text())
        if before.pop("state") == state and all(sha256(Path(file)) == digest for file, digest in before.items()):
            return list(map(Path, before))
    files = make(spec, scale, series, draw, results, text)
    write_atomically(kept, json.dumps({"state": state} | {str(file): sha256(file) for file in files}).encode())
    return files


def sha256_of(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


@once
def _sources() -> list[Path]:
    """The files of the code that draws, and the thesis's numbers, which it draws."""
    code = sorted(file for file in Path(__file__).parent.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return [*code, ROOT / "results" / "thesis.csv"]


def _below(spec: FigureSpec, scale: str, left_out: Sequence[str], width: float) -> list[str]:
    """The lines below a picture: its notes, scale and seeds, so that a copy of the picture alone has them."""
    seeds = seeds_of(spec, scale)
    origin = f"scale={scale}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    origin += f"; not run yet: {'; '.join(left_out)}" if left_out else ""
    return [*(line for note in specs.notes(spec, scale) for line in textwrap.wrap(note, int(NOTE_WIDTH * width))), origin]


def to_markdown(spec: FigureSpec, scale: str, series: Sequence[Series], text: provenance.Caption) -> str:
    names = {"number": spec["number"], "title": spec.get("title", ""), "scale": scale}
    return rendered("figure.md", **names, text=text, runs=runs_of(series))


def _saved(figure: Figure, kind: str) -> bytes:
    """The picture without date and versions, so that the same records give the same bytes."""
    content, left_out = io.BytesIO(), {"png": "Software", "pdf": "CreationDate"}.get(kind, "Date")
    figure.savefig(content, format=kind, metadata={left_out: None})
    return content.getvalue()
