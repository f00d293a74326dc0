"""Curves over training, noise, removed pixels or randomised layers, with bands; and figure 2.1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from gradexp.base.errors import UserError
from gradexp.engine.record import Record, value_of
from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series
from gradexp.report.specs import FigureSpec, Thesis, read_thesis

REFERENCE = "#555555"  # the colour of the thesis's own numbers


def curves(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One recorded curve for each series, over the index of its entries, from 1.

    spec: `metric` (a recorded list), `xlabel`, `ylabel`; `lines`: [{y, label}], horizontal lines at numbers of the thesis.
    """
    figure = Figure(figsize=(COLUMN_WIDTH, 0.72 * COLUMN_WIDTH))
    axes = figure.subplots()
    rows: list[Row] = []
    for one, colour in zip(series, itertools.cycle(PALETTE)):
        rows += [{"series": one.label, **point} for point in _line(axes, one, None, spec["metric"], colour)]
    for line in spec.get("lines", []):
        axes.axhline(line["y"], color=REFERENCE, linestyle="--", linewidth=0.9, label=line["label"])
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    figure.legend(loc="outside upper center", ncols=3)  # inside the axes it would hide curves
    return figure, rows


def panels(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
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
        {"x": f"{a:.5g}", "mean": f"{m:.5g}", "std": f"{s:.3g}" if len(one.records) > 1 else "", "n": len(one.records)}
        for a, m, s in zip(x, mean, std, strict=True)
    ]


# --- saliency methods (Chapter 3) ---------------------------------------------------------------------------

# colour (Okabe and Ito's), marker, dashes: distinguishable without colour. Variants of a method share its colour.
Style = tuple[str, str, Any]  # colour, marker, dashes
METHODS: dict[str, Style] = {
    "Random": ("#999999", "x", "-"),
    "Input-gradient": ("#0072B2", "s", "-"),
    "Integrated gradients": ("#CC79A7", "^", "-"),
    "SmoothGrad": ("#E69F00", "v", (0, (4, 2))),
    "SmoothGrad-squared": ("#E69F00", "v", (0, (4, 2))),
    "Grad-CAM": ("#009E73", "D", "-"),
    "Grad-CAM, 4x4": ("#009E73", "d", (0, (2, 1.5))),
    "FullGrad": ("#D55E00", "o", "-"),
    "FullGrad, Eq. 3.2": ("#D55E00", "P", (0, (4, 2))),
    "FullGrad, not rescaled": ("#D55E00", "X", (0, (6, 1.5))),
    "FullGrad, no abs": ("#D55E00", "*", (0, (1, 1.5))),
}
# Of methods that are not among these: one of a user's own.
SPARE: list[Style] = [("#332288", "<", "-."), ("#882255", ">", "-."), ("#117733", "p", "-."), ("#661100", "h", "-.")]
CHANGE = "output_change@removed="
AREA = "output_change_area"
BASELINE = "untouched"
NORMAL = 1.96  # standard errors on either side of a 95 % interval
# x in per cent of the pixels, or a number of layers; std over n images or runs; error: half the height of the band.
POINTS = ["series", "x", "mean", "std", "error", "n"]
THESIS: Any = {"marker": "o", "markerfacecolor": "none", "linestyle": "none", "alpha": 0.45, "markersize": 5}


def style(label: str, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of `plot` for a method. Random's line is broad and below the others, so that none hides it.

    labels: of the figure; those that are not in METHODS get the spare styles in this order.
    """
    own = [name for name in labels if name not in METHODS] or [label]
    colour, marker, dashes = METHODS.get(label) or SPARE[own.index(label) % len(SPARE)]
    below = {"linewidth": 3.0, "alpha": 0.6, "zorder": 1} if label == "Random" else {"zorder": 3 if "FullGrad" in label else 2}
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 3.5, "linewidth": 1.2, **below}


def output_change(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`output_change@removed=...` of one run for each series on a log scale, with the standard error over images (fig. 3.2a).

    The legend has each curve's `output_change_area` with its 95 % interval, if it is recorded. spec: `reading`, the name of a
    recorded reading (evaluate.readings); without it, the run's own way to remove pixels.
    """
    prefix = f"test/{spec['reading']}/" if "reading" in spec else "test/"
    rows, areas = [], {}
    for one in series:
        record = one.records[0]
        names = [name for name in record["metrics"] if name.startswith(prefix + CHANGE) and not name.endswith("/std")]
        fractions = {float(name.rpartition("=")[2]): name for name in names}
        rows += [_over_images(one.label, record, fractions[x], 100 * x) for x in sorted(fractions)]
        if f"{prefix}{AREA}" in record["metrics"]:
            areas[one.label] = _over_images(one.label, record, f"{prefix}{AREA}", math.nan)
    points = pd.DataFrame(rows, columns=POINTS)
    suffixes = {label: f": {mean:.3f} ± {NORMAL * error:.3f}" for label, (*_, mean, _, error, _) in areas.items()}
    figure, axes = _by_method(spec, points, suffixes)
    ticks = points[points["series"] == points["series"].iloc[0]]["x"]
    axes.set_xscale("log")
    axes.set_xticks(ticks.tolist(), [f"{x:g}" for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.05 * (points["mean"] + points["error"]).max())
    return figure, _rows(points, spec) + _rows(pd.DataFrame(areas.values(), columns=POINTS), spec)


def retrained_accuracy(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`test/accuracy` at each point, mean and standard deviation over seeds; every curve starts at `untouched` (fig. 3.2b)."""
    rows = []
    for one in series:
        values = one.metric("test/accuracy")
        std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
        rows.append((one.label, one.spec["x"], values.mean(), std, std, len(values)))
    points = pd.DataFrame(rows, columns=POINTS)
    start, rest = points[points["series"] == BASELINE], points[points["series"] != BASELINE]
    if start.empty:
        raise UserError(f"figure {spec['number']}: every curve starts at the series {BASELINE!r}, which it has not; add it")
    labels = rest["series"].unique()
    lines = [frame for label in labels for frame in (start.assign(series=label), rest[rest["series"] == label])]
    figure, axes = _by_method(spec, pd.concat(lines))
    axes.plot(start["x"], start["mean"], "s", color="black", markersize=4, clip_on=False)
    axes.set_xticks([*start["x"], *rest[rest["series"] == labels[0]]["x"]])
    axes.set_ylim(bottom=0)
    return figure, _rows(pd.concat([start, rest]), spec)


def randomisation(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`correlation` over `randomised` layers of one run for each series, with its standard error over images (§3.4.1)."""
    lines = []
    for one in series:
        x, mean, std = (one.metric(name)[0] for name in ("randomised", "correlation", "correlation/std"))
        images = one.records[0]["images"]
        line = {"series": one.label, "x": x, "mean": mean, "std": std, "error": std / math.sqrt(images), "n": images}
        lines.append(pd.DataFrame({**line, "layer": one.records[0]["layers"]}))
    points = pd.concat(lines)
    figure, axes = _by_method(spec, points)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(points["x"].unique())
    return figure, _rows(points, spec)


def _over_images(label: str, record: Record, name: str, x: float) -> tuple[str, float, float, float, float, int]:
    mean, std, images = value_of(record, name), value_of(record, f"{name}/std"), record["images"]
    return label, x, mean, std, std / math.sqrt(images), images


def _by_method(spec: FigureSpec, points: pd.DataFrame, suffixes: Mapping[str, str] | None = None) -> tuple[Figure, Axes]:
    """A line with a band for each series, beside its legend. suffixes: what follows a series' label there."""
    figure = Figure(figsize=(1.5 * COLUMN_WIDTH, 0.9 * COLUMN_WIDTH))
    axes = figure.subplots()
    labels = [str(label) for label in points["series"].unique()]
    for label, line in points.groupby("series", sort=False):
        look = style(str(label), labels)
        axes.plot(line["x"], line["mean"], label=f"{label}{(suffixes or {}).get(str(label), '')}", **look)
        if line["error"].notna().any():
            low, high = line["mean"] - line["error"], line["mean"] + line["error"]
            axes.fill_between(line["x"], low, high, color=look["color"], alpha=0.15, linewidth=0)
        printed = _thesis(line, spec)
        if printed.notna().any():
            axes.plot(line["x"], printed, color=look["color"], **THESIS)
    handles, labels = axes.get_legend_handles_labels()
    if any(item == spec.get("thesis") for item, *_ in read_thesis()):
        handles, labels = [*handles, Line2D([], [], color="black", **THESIS)], [*labels, "thesis (its poster)"]
    axes.legend(handles, labels, fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    return figure, axes


def _thesis(points: pd.DataFrame, spec: FigureSpec) -> pd.Series[float]:
    """The thesis's own values at these points, read off the author's poster; NaN where there is none."""
    keys = [(str(spec.get("thesis", "")), str(label), f"{x:g}") for label, x in zip(points["series"], points["x"], strict=True)]
    numbers = [read_thesis().get(key, Thesis()).value for key in keys]
    return pd.Series(numbers, points.index, dtype=float)


def _rows(points: pd.DataFrame, spec: FigureSpec) -> list[Row]:
    formats = {"mean": "{:.5g}", "std": "{:.3g}", "error": "{:.3g}"}
    texts = {name: points[name].map(form.format, na_action="ignore").fillna("") for name, form in formats.items()}
    x = points["x"].map("{:g}".format).replace("nan", "area")
    thesis = _thesis(points, spec).astype(object).fillna("")
    rows: list[Row] = points.assign(x=x, **texts, thesis=thesis).to_dict("records")  # type: ignore[assignment]
    return rows


# --- figure 2.1 ---------------------------------------------------------------------------------------------

TITLES = ("Matching the data points", "With noise on the inputs, or slopes")  # of the panels
STUDENTS = {  # by array: panel, label, dashes, colour
    "activations": (0, "student: values", "-", PALETTE[1]),
    "noise": (1, "student: values, noisy inputs", "--", PALETTE[4]),
    "jacobian": (1, "student: values and slopes", "-", PALETTE[0]),
}
TANGENT = 0.28  # half the length of a tangent, in units of x


def illustration(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """Two panels: a student that matches values alone; students that match slopes, explicitly and through noise."""
    arrays = series[0].arrays[0]
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 0.95 * COLUMN_WIDTH))
    for panel, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        axes.plot(arrays["x"], arrays["teacher"], color="black", linewidth=1.0, label="teacher")
        for name, (own, label, dashes, colour) in STUDENTS.items():
            if own == panel:
                axes.plot(arrays["x"], arrays[name], dashes, color=colour, label=label)
        if panel:
            x, y, slope = arrays["points"], arrays["values"], arrays["slopes"]
            half = TANGENT / np.sqrt(1 + slope**2)
            ends = [x - half, x + half], [y - half * slope, y + half * slope]
            axes.plot(*ends, color="black", linewidth=2.6, alpha=0.35, label="teacher's slopes")
        axes.plot(arrays["points"], arrays["values"], "o", color="black", markersize=4, label="data points", zorder=3)
        axes.set(title=TITLES[panel], xlabel="input x")
    entries = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=-(-len(entries) // 2))
    figure.axes[0].set_ylabel("output")
    columns = {name: [f"{value:.5f}" for value in arrays[name]] for name in ("teacher", *STUDENTS)}
    rows = pd.DataFrame({"x": [f"{x:.4f}" for x in arrays["x"]], **columns}).to_dict("records")
    return figure, rows  # type: ignore[return-value]
