"""Correlation of saliency maps with those of a model with randomised layers, one line for each method (§3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.draw.methods import style
from gradexp.report.figures import COLUMN_WIDTH, Row, Series


def randomisation(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """`correlation` over `randomised` of one run for each series, with its standard error over images as a band."""
    figure = Figure(figsize=(1.5 * COLUMN_WIDTH, 0.9 * COLUMN_WIDTH))
    axes = figure.subplots()
    rows: list[Row] = []
    for one in series:
        record = one.records[0]
        x, mean, std = (one.metric(name)[0] for name in ("randomised", "correlation", "correlation/std"))
        error = std / np.sqrt(record["images"])
        (drawn,) = axes.plot(x, mean, label=one.label, **style(one.label))
        axes.fill_between(x, mean - error, mean + error, color=drawn.get_color(), alpha=0.15, linewidth=0)
        rows += [
            {"series": one.label, "x": f"{a:g}", "layer": layer, "mean": f"{m:.4g}", "std": f"{s:.3g}", "n": record["images"]}
            for a, layer, m, s in zip(x, record["layers"], mean, std, strict=True)
        ]
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel=spec["xlabel"], ylabel=spec["ylabel"], xticks=x)
    axes.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.0), handlelength=3)
    return figure, rows
