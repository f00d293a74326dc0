"""What the removal of pixels does: curves over the removed fraction, one a saliency method (fig. 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from gradexp.report.figures import COLUMN_WIDTH, METHODS, PALETTE, Row, Series
from gradexp.report.tables import read_thesis
from gradexp.runs import Config

CHANGE = "test/output_change@removed="
BASELINE = "untouched"


@dataclass(frozen=True)
class Point:
    x: float  # per cent of the pixels
    mean: float
    std: float
    n: int  # runs


Lines = dict[str, list[Point]]


def output_change(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`test/output_change@removed=...` of one run a series, its standard deviation over images as a band; log scale."""
    lines: Lines = {}
    for one in series:
        names = [name for name in one.records[0]["metrics"] if name.startswith(CHANGE) and not name.endswith("/std")]
        for name in sorted(names, key=_fraction):
            values, spreads = one.metric(name), one.metric(f"{name}/std")
            point = Point(100 * _fraction(name), values.mean(), float(np.sqrt((spreads**2).mean())), len(values))
            lines.setdefault(one.label, []).append(point)
    figure, axes = _axes(spec)
    axes.set_xscale("log")
    ticks = [point.x for point in next(iter(lines.values()))]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    _draw(axes, lines, spec)
    axes.set_ylim(0, 1.25 * max(point.mean for line in lines.values() for point in line))
    return figure, _rows(lines, spec)


def retrained_accuracy(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`test/accuracy` of the runs at each point: mean and standard deviation over seeds. `untouched` begins every curve."""
    lines: Lines = {}
    for one in series:
        values = one.metric("test/accuracy")
        point = Point(one.spec["x"], values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0, len(values))
        lines.setdefault(one.label, []).append(point)
    start = lines.pop(BASELINE)
    figure, axes = _axes(spec)
    _draw(axes, {label: start + line for label, line in lines.items()}, spec)
    axes.plot([point.x for point in start], [point.mean for point in start], "s", color="black", markersize=4, clip_on=False)
    axes.set_xticks([point.x for point in start] + [point.x for point in next(iter(lines.values()))])
    axes.set_ylim(bottom=0)
    return figure, _rows({BASELINE: start, **lines}, spec)


def _fraction(name: str) -> float:
    return float(name.removeprefix(CHANGE))


def _axes(spec: Config) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN_WIDTH, 0.85 * COLUMN_WIDTH))
    axes = figure.subplots()
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    return figure, axes


def _draw(axes: Axes, lines: Lines, spec: Config) -> None:
    thesis = _thesis(spec)
    others = itertools.cycle(colour for colour in PALETTE if colour not in METHODS.values())
    for label, line in lines.items():
        colour = METHODS.get(label) or next(others)
        x, mean, std = (np.array([getattr(point, name) for point in line]) for name in ("x", "mean", "std"))
        front = 3 if label == "FullGrad" else 2  # what the figure is about lies above the rest
        axes.plot(x, mean, color=colour, marker="o", markersize=2.5, label=label, zorder=front)
        if std.any():
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.08, linewidth=0)
        printed = [(point.x, thesis[label, point.x]) for point in line if (label, point.x) in thesis]
        if printed:
            axes.plot(*zip(*printed, strict=True), "o", color=colour, markerfacecolor="none", alpha=0.45, markersize=5)
    handles, labels = axes.get_legend_handles_labels()
    if thesis:
        faint = Line2D([], [], color="black", marker="o", linestyle="none", markerfacecolor="none", alpha=0.45, markersize=5)
        handles, labels = [*handles, faint], [*labels, "thesis (its poster)"]
    axes.legend(handles, labels, fontsize=6.5)


def _thesis(spec: Config) -> dict[tuple[str, float], float]:
    """The thesis's own values, as read off the author's poster: {(method, per cent): value}."""
    mine = [(key, number.value) for key, number in read_thesis().items() if len(key) == 3 and key[0] == spec.get("thesis")]
    return {(row, float(column)): value for (_, row, column), value in mine}


def _rows(lines: Lines, spec: Config) -> list[Row]:
    thesis = _thesis(spec)
    return [
        {
            "series": label,
            "x": f"{point.x:g}",
            "mean": f"{point.mean:.5g}",
            "std": f"{point.std:.3g}",
            "n": point.n,
            "thesis": thesis.get((label, point.x), ""),
        }
        for label, line in lines.items()
        for point in line
    ]
