"""What the removal of pixels does: curves over the removed fraction, one a saliency method (fig. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True)
class Point:
    x: float  # per cent of the pixels
    mean: float
    std: float  # over images, or over runs
    error: float  # what the band shows: over images the mean's standard error, over runs their standard deviation
    n: int  # images, or runs


Lines = dict[str, list[Point]]


def output_change(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`output_change@removed=...` of one run a series, its standard error over images as a band; log scale.

    The legend has each curve's `output_change_area` with its interval (95 %), where it is recorded. spec: `reading` is the
    name of the recorded reading (evaluate.readings), none for the run's own way to remove pixels.
    """
    prefix = f"test/{spec['reading']}/" if "reading" in spec else "test/"
    lines: Lines = {}
    areas: dict[str, Point] = {}
    for one in series:
        record = one.records[0]
        names = [name for name in record["metrics"] if name.startswith(prefix + CHANGE) and not name.endswith("/std")]
        for name in sorted(names, key=_fraction):
            lines.setdefault(one.label, []).append(_over_images(record, name, 100 * _fraction(name)))
        if f"{prefix}{AREA}" in record["metrics"]:
            areas[one.label] = _over_images(record, f"{prefix}{AREA}", math.nan)
    figure, axes = _axes(spec)
    axes.set_xscale("log")
    ticks = [point.x for point in next(iter(lines.values()))]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _draw(axes, lines, spec, {label: f"{area.mean:.3f} ± {NORMAL * area.error:.3f}" for label, area in areas.items()})
    axes.set_ylim(0, 1.05 * np.nanmax([point.mean + point.error for line in lines.values() for point in line]))
    return figure, _rows(lines, spec) + [_row(label, "area", area, "") for label, area in areas.items()]


def retrained_accuracy(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`test/accuracy` of the runs at each point: mean and standard deviation over seeds. `untouched` begins every curve."""
    lines: Lines = {}
    for one in series:
        values = one.metric("test/accuracy")
        std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        lines.setdefault(one.label, []).append(Point(one.spec["x"], values.mean(), std, std, len(values)))
    start = lines.pop(BASELINE)
    figure, axes = _axes(spec)
    _draw(axes, {label: start + line for label, line in lines.items()}, spec)
    axes.plot([point.x for point in start], [point.mean for point in start], "s", color="black", markersize=4, clip_on=False)
    axes.set_xticks([point.x for point in start] + [point.x for point in next(iter(lines.values()))])
    axes.set_ylim(bottom=0)
    return figure, _rows({BASELINE: start, **lines}, spec)


def _over_images(record: Config, name: str, x: float) -> Point:
    mean, std, images = value_of(record, name), value_of(record, f"{name}/std"), record["images"]
    return Point(x, mean, std, std / math.sqrt(images), images)


def _fraction(name: str) -> float:
    return float(name.rpartition("=")[2])


def _axes(spec: Config) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(1.5 * COLUMN_WIDTH, 0.9 * COLUMN_WIDTH))
    axes = figure.subplots()
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    return figure, axes


def _draw(axes: Axes, lines: Lines, spec: Config, beside: dict[str, str] | None = None) -> None:
    """beside: what the legend says behind a line's label."""
    thesis, said = _thesis(spec), beside or {}
    for label, line in lines.items():
        look = style(label)
        name = f"{label}: {said[label]}" if label in said else label
        colour = look["color"]
        axes.plot([point.x for point in line], [point.mean for point in line], label=name, **look)
        low, high = ([point.mean + sign * point.error for point in line] for sign in (-1, 1))
        if low != high:
            axes.fill_between([point.x for point in line], low, high, color=colour, alpha=0.15, linewidth=0)
        printed = [(point.x, thesis[label, point.x]) for point in line if (label, point.x) in thesis]
        if printed:
            axes.plot(*zip(*printed, strict=True), "o", color=colour, markerfacecolor="none", alpha=0.45, markersize=5)
    handles, labels = axes.get_legend_handles_labels()
    if thesis:
        faint = Line2D([], [], color="black", marker="o", linestyle="none", markerfacecolor="none", alpha=0.45, markersize=5)
        handles, labels = [*handles, faint], [*labels, "thesis (its poster)"]
    axes.legend(handles, labels, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)


def _thesis(spec: Config) -> dict[tuple[str, float], float]:
    """The thesis's own values, as read off the author's poster: {(method, per cent): value}."""
    mine = [(key, number.value) for key, number in read_thesis().items() if len(key) == 3 and key[0] == spec.get("thesis")]
    return {(row, float(column)): value for (_, row, column), value in mine}


def _rows(lines: Lines, spec: Config) -> list[Row]:
    thesis = _thesis(spec)
    return [
        _row(label, f"{point.x:g}", point, thesis.get((label, point.x), "")) for label, line in lines.items() for point in line
    ]


def _row(label: str, x: str, point: Point, thesis: float | str) -> Row:
    numbers = {"mean": f"{point.mean:.5g}", "std": f"{point.std:.3g}", "error": f"{point.error:.3g}", "n": point.n}
    return {"series": label, "x": x, **numbers, "thesis": thesis}
