"""Metrics over training, over noise or over a sweep, as lines with bands: mean over seeds, one standard deviation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series

THESIS = "#555555"  # the colour of the thesis's own numbers


def curves(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One recorded curve for each series, over the index of its entries, from 1.

    spec: `metric` (a recorded list), `xlabel`, `ylabel`; `lines`: [{y, label}], horizontal lines at numbers of the thesis.
    """
    figure = Figure(figsize=(COLUMN_WIDTH, 0.72 * COLUMN_WIDTH))
    axes = figure.subplots()
    rows: list[Row] = []
    for one, colour in zip(series, itertools.cycle(PALETTE)):
        rows += [{"series": one.label, **point} for point in _line(axes, one, None, spec["metric"], colour)]
    for line in spec.get("lines", []):
        axes.axhline(line["y"], color=THESIS, linestyle="--", linewidth=0.9, label=line["label"])
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    figure.legend(loc="outside upper center", ncols=3)  # inside the axes it would hide curves
    return figure, rows


def panels(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """A grid of plots: a column for each `panel` that series name, a row for each entry of `curves`.

    A label has the same colour in all panels.
    spec: `x` (recorded list), `xlabel`, `xscale`; `curves`: [{metric, ylabel, yscale}]; `panels`: {name: title}.
    """
    names = list(dict.fromkeys(str(one.spec.get("panel", "")) for one in series))
    colours = dict(zip(dict.fromkeys(one.label for one in series), itertools.cycle(PALETTE)))
    wide = [(curve, name) for curve in spec["curves"] for name in names]
    shape = (len(spec["curves"]), len(names)) if len(names) > 1 else (1, len(wide))
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 2.3 * shape[0]))
    all_axes = figure.subplots(*shape, squeeze=False, sharex=True).ravel()
    rows: list[Row] = []
    for axes, (curve, name) in zip(all_axes, wide, strict=True):
        for one in (one for one in series if str(one.spec.get("panel", "")) == name):
            keys = {"panel": name, "metric": curve["metric"], "series": one.label}
            line = _line(axes, one, one.metric(spec["x"])[0], curve["metric"], colours[one.label])
            rows += [{**keys, **point} for point in line]
        axes.set(xscale=spec["xscale"], yscale=curve.get("yscale", "linear"), ylabel=curve["ylabel"])
        axes.set_title(spec.get("panels", {}).get(name, "") if curve is spec["curves"][0] else "")
    for axes in all_axes[-shape[1] :]:
        axes.set_xlabel(spec["xlabel"])
    all_axes[0].legend()
    return figure, rows


def _line(axes: Axes, one: Series, x: Any, metric: str, colour: str) -> list[Row]:
    """Draw a series' curve over x (length,), or over its index if x is None, with its band; return its points."""
    mean, std = one.band(metric)
    x = range(1, len(mean) + 1) if x is None else x
    axes.plot(x, mean, color=colour, label=one.label)
    if len(one.records) > 1:
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    return [
        {"x": f"{a:.5g}", "mean": f"{m:.5g}", "std": f"{s:.3g}", "n": len(one.records)}
        for a, m, s in zip(x, mean, std, strict=True)
    ]
