"""Pictures in rows: samples, gradients, saliency over an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.figures import COLUMN_WIDTH, Row, Series

Pictures = np.ndarray  # (N, C, H, W) uint8


def samples(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """A row of pictures for each series, below a row for each array in `above` of the first series.

    spec: `array`, the pictures of a series; `signed`, whether they are gradients (each is rescaled around grey);
    `above`: {array: label}; `beside`: {array: metric}, a number shown below the label; `metrics`: columns of the CSV file.
    """
    one, array = series[0], spec["array"]
    rows = [(_label(one, label, spec, name), one.arrays[0][name]) for name, label in spec.get("above", {}).items()]
    rows += [
        (_label(one, one.label, spec, array), _pictures(one.arrays[0][array], spec.get("signed", False))) for one in series
    ]
    figure = grid(rows)
    return figure, [
        {"series": one.label, **{name: f"{one.metric(name)[0]:.5g}" for name in spec["metrics"]}, "run": one.runs[0].id}
        for one in series
    ]


def grid(rows: Sequence[tuple[str, Pictures]]) -> Figure:
    """Rows of pictures with their labels on the left, as wide as a page."""
    count = max(len(pictures) for _, pictures in rows)
    width = 2 * COLUMN_WIDTH
    figure = Figure(figsize=(width, (width - 1.1) / count * len(rows) + 0.1))
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, pictures) in zip(axes, rows, strict=True):
        for panel, picture in zip(line, pictures, strict=False):
            show(panel, picture)
        for panel in line:
            bare(panel)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    return figure


def bare(axes: Axes) -> None:
    """Remove ticks, frame and grid."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def show(axes: Axes, picture: Any) -> None:
    """Show a picture (C, H, W), uint8 or in [0, 1], without interpolation."""
    axes.imshow(np.moveaxis(picture if len(picture) == 3 else picture.repeat(3, 0), 0, 2), interpolation="nearest")


def signed(gradients: np.ndarray) -> np.ndarray:
    """Signed gradients (N, C, H, W) around mid-grey, each rescaled by its own largest magnitude."""
    values = gradients.astype(np.float32)
    size = np.abs(values).max((1, 2, 3), keepdims=True)
    return 0.5 + 0.5 * values / np.maximum(size, np.finfo(np.float32).tiny)


def red_over(image: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """An image (C, H, W) uint8 in light grey, red where the saliency (H, W) is large. -> (3, H, W) in [0, 1]."""
    grey = 0.45 + 0.5 * image.mean(0) / 255
    strength = np.clip(saliency / max(float(np.quantile(saliency, 0.98)), 1e-12), 0, 1)
    red = np.array([0.8, 0.0, 0.05])[:, None, None]
    mixed: np.ndarray = (1 - strength) * grey + strength * red
    return mixed


def _label(one: Series, label: str, spec: Config, array: str) -> str:
    if one.records[0]["status"] == "diverged":
        return f"{label}\n(diverged)"
    metric = spec.get("beside", {}).get(array)
    return f"{label}\n{one.metric(metric)[0]:.3f}" if metric else label


def _pictures(values: np.ndarray, is_signed: bool) -> np.ndarray:
    return signed(values) if is_signed else values
