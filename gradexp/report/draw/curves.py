"""Metrics over training or over a sweep, as lines with bands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series
from gradexp.runs import Config


def curves(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One recorded curve a series: mean over seeds, a band of one standard deviation.

    spec: `metric` (a recorded list), `xlabel`, `ylabel`, `title`; x counts the entries of the list from 1.
    """
    figure = Figure(figsize=(COLUMN_WIDTH, 0.72 * COLUMN_WIDTH))
    axes = figure.subplots()
    rows: list[Row] = []
    for one, colour in zip(series, PALETTE, strict=False):
        mean, std = one.band(spec["metric"])
        x = np.arange(1, len(mean) + 1)
        axes.plot(x, mean, color=colour, label=one.label)
        if len(one.records) > 1:
            axes.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        rows += [
            {"series": one.label, "x": int(i), "mean": f"{m:.5g}", "std": f"{s:.3g}", "n": len(one.records)}
            for i, m, s in zip(x, mean, std, strict=True)
        ]
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"])
    axes.legend()
    return figure, rows
