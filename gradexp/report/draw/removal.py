"""Curves over the fraction of removed pixels, one for each saliency method (fig. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from gradexp.engine.record import value_of
from gradexp.engine.run import Config
from gradexp.report.draw.methods import style
from gradexp.report.figures import COLUMN_WIDTH, Row, Series
from gradexp.report.thesis import read_thesis

CHANGE = "output_change@removed="
AREA = "output_change_area"
BASELINE = "untouched"
NORMAL = 1.96  # standard errors on either side of a 95 % interval
# Points of curves: x in per cent of the pixels; std over n images or runs; error: half the height of the band.
COLUMNS = ["series", "x", "mean", "std", "error", "n"]
THESIS: Any = {"marker": "o", "markerfacecolor": "none", "linestyle": "none", "alpha": 0.45, "markersize": 5}


def output_change(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`output_change@removed=...` of one run for each series on a log scale, with the standard error over images as a band.

    The legend has each curve's `output_change_area` with its 95 % interval, if it is recorded. spec: `reading`, the name of a
    recorded reading (evaluate.readings); without it, the run's own way to remove pixels.
    """
    prefix = f"test/{spec['reading']}/" if "reading" in spec else "test/"
    rows, areas = [], {}
    for one in series:
        record = one.records[0]
        names = [name for name in record["metrics"] if name.startswith(prefix + CHANGE) and not name.endswith("/std")]
        rows += [_over_images(one.label, record, name, 100 * _fraction(name)) for name in sorted(names, key=_fraction)]
        if f"{prefix}{AREA}" in record["metrics"]:
            areas[one.label] = _over_images(one.label, record, f"{prefix}{AREA}", math.nan)
    points = pd.DataFrame(rows, columns=COLUMNS)
    figure, axes = _axes(spec)
    axes.set_xscale("log")
    ticks = points[points["series"] == points["series"].iloc[0]]["x"]
    axes.set_xticks(ticks.tolist(), [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _draw(
        axes, points, spec, {label: f": {mean:.3f} ± {NORMAL * error:.3f}" for label, (*_, mean, _, error, _) in areas.items()}
    )
    axes.set_ylim(0, 1.05 * (points["mean"] + points["error"]).max())
    return figure, _rows(points, spec) + _rows(pd.DataFrame(areas.values(), columns=COLUMNS), spec)


def retrained_accuracy(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`test/accuracy` at each point, mean and standard deviation over seeds; every curve starts at the series `untouched`."""
    rows = []
    for one in series:
        values = one.metric("test/accuracy")
        std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        rows.append((one.label, one.spec["x"], values.mean(), std, std, len(values)))
    points = pd.DataFrame(rows, columns=COLUMNS)
    start, rest = points[points["series"] == BASELINE], points[points["series"] != BASELINE]
    figure, axes = _axes(spec)
    labels = rest["series"].unique()
    _draw(
        axes,
        pd.concat([frame for label in labels for frame in (start.assign(series=label), rest[rest["series"] == label])]),
        spec,
    )
    axes.plot(start["x"], start["mean"], "s", color="black", markersize=4, clip_on=False)
    axes.set_xticks([*start["x"], *rest[rest["series"] == labels[0]]["x"]])
    axes.set_ylim(bottom=0)
    return figure, _rows(pd.concat([start, rest]), spec)


def _over_images(label: str, record: Config, name: str, x: float) -> tuple[str, float, float, float, float, int]:
    mean, std, images = value_of(record, name), value_of(record, f"{name}/std"), record["images"]
    return label, x, mean, std, std / math.sqrt(images), images


def _fraction(name: str) -> float:
    return float(name.rpartition("=")[2])


def _axes(spec: Config) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(1.5 * COLUMN_WIDTH, 0.9 * COLUMN_WIDTH))
    axes = figure.subplots()
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    return figure, axes


def _draw(axes: Axes, points: pd.DataFrame, spec: Config, suffixes: dict[str, str] | None = None) -> None:
    """Draw a line with a band for each series. suffixes: what follows a series' label in the legend."""
    for label, line in points.groupby("series", sort=False):
        look = style(str(label))
        axes.plot(line["x"], line["mean"], label=f"{label}{(suffixes or {}).get(str(label), '')}", **look)
        low, high = line["mean"] - line["error"], line["mean"] + line["error"]
        if (low != high).any():
            axes.fill_between(line["x"], low, high, color=look["color"], alpha=0.15, linewidth=0)
        printed = _thesis(line, spec)
        if printed.notna().any():
            axes.plot(line["x"], printed, color=look["color"], **THESIS)
    handles, labels = axes.get_legend_handles_labels()
    if any(key[0] == spec.get("thesis") for key in read_thesis()):
        handles, labels = [*handles, Line2D([], [], color="black", **THESIS)], [*labels, "thesis (its poster)"]
    axes.legend(handles, labels, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)


def _thesis(points: pd.DataFrame, spec: Config) -> pd.Series[float]:
    """The thesis's own values at these points, read off the author's poster; NaN where there is none."""
    printed = {key[1:]: number.value for key, number in read_thesis().items() if len(key) == 3 and key[0] == spec.get("thesis")}
    keys = zip(points["series"], points["x"].map("{:g}".format), strict=True)
    return pd.Series([printed.get(key, math.nan) for key in keys], points.index, dtype=float)


def _rows(points: pd.DataFrame, spec: Config) -> list[Row]:
    formats = {"mean": "{:.5g}", "std": "{:.3g}", "error": "{:.3g}"}
    texts = {name: points[name].map(form.format) for name, form in formats.items()}
    x = points["x"].map("{:g}".format).replace("nan", "area")
    thesis = _thesis(points, spec).astype(object).fillna("")
    rows: list[Row] = points.assign(x=x, **texts, thesis=thesis).to_dict("records")  # type: ignore[assignment]
    return rows
