"""Several recorded curves a run, in panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series
from gradexp.runs import Config


def panels(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """Columns: the panels that series name (`panel`, one for all if none does); rows: the entries of `curves`.

    Over seeds, mean and a band of one standard deviation. A label has one colour in all panels.
    spec: `x` (recorded list), `xlabel`, `xscale`; `curves`: [{metric, ylabel, yscale}]; `panels`: {name: title}.
    """
    names = list(dict.fromkeys(str(one.spec.get("panel", "")) for one in series))
    colours = dict(zip(dict.fromkeys(one.label for one in series), PALETTE, strict=False))
    wide = [(curve, name) for curve in spec["curves"] for name in names]
    shape = (len(spec["curves"]), len(names)) if len(names) > 1 else (1, len(wide))
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 2.3 * shape[0]))
    all_axes = figure.subplots(*shape, squeeze=False, sharex=True).ravel()
    rows: list[Row] = []
    for axes, (curve, name) in zip(all_axes, wide, strict=True):
        for one in (one for one in series if str(one.spec.get("panel", "")) == name):
            rows += _line(axes, spec, curve, one, name, colours[one.label])
        axes.set(xscale=spec["xscale"], yscale=curve.get("yscale", "linear"), ylabel=curve["ylabel"])
        axes.set_title(spec.get("panels", {}).get(name, "") if curve is spec["curves"][0] else "")
    for axes in all_axes[-shape[1] :]:
        axes.set_xlabel(spec["xlabel"])
    all_axes[0].legend()
    return figure, rows


def _line(axes: Any, spec: Config, curve: Config, one: Series, panel: str, colour: str) -> list[Row]:
    x = one.metric(spec["x"])[0]
    mean, std = one.band(curve["metric"])
    axes.plot(x, mean, color=colour, label=one.label)
    if len(one.records) > 1:
        axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    common = {"panel": panel, "metric": curve["metric"], "series": one.label}
    return [
        {**common, "x": f"{a:.5g}", "mean": f"{m:.5g}", "std": f"{s:.3g}", "n": len(one.records)}
        for a, m, s in zip(x, mean, np.nan_to_num(std), strict=True)
    ]
