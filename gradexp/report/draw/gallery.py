"""Pictures and their saliency maps, side by side (figs. 3.1, 3.3, 3.4)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradexp.base.errors import UserError
from gradexp.engine.run import Config
from gradexp.report.figures import PAGE_WIDTH, Row, Series

MAP = "inferno"  # dark to bright in even steps, also in grey and for the colour-blind
SIGNED = "RdBu_r"
OVERLAY = "YlOrRd"
CLIP = 99.5  # percentile of a map that is drawn brightest, so that one pixel does not darken all others
MOST_OVERLAID = 0.85  # largest opacity of a map over its image


def gallery(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a line, one method a column, from the arrays `images` and `maps` of each series.

    spec: `first` and `rows` select the images; `overlay` of a series draws its maps over them.
    """
    arrays = [one.arrays[0] for one in series]
    if any(not np.array_equal(own["images"], arrays[0]["images"]) for own in arrays):
        raise UserError(f"figure {spec['number']}: its runs have different images; delete their records and run again")
    images = arrays[0]["images"]
    lines = range(spec["first"], min(spec["first"] + spec["rows"], len(images)))
    figure, grid = _grid(len(lines), 1 + len(series), ["Image", *(one.label for one in series)])
    rows: list[Row] = []
    for axes, i in zip(grid, lines, strict=True):
        picture(axes[0], images[i])
        _name(axes[0], series[0], i)
        for panel, one, own in zip(axes[1:], series, arrays, strict=True):
            draw_map(panel, own["maps"][i], images[i] if one.spec.get("overlay") else None)
            rows.append({"image": i, "column": one.label, **_facts(one, i), **_spread(own["maps"][i])})
    return figure, rows


def layers(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a line: the image, ∇f ⊙ x, the bias-gradients of `columns` evenly spaced layers, and FullGrad."""
    (one,) = series
    (arrays,) = one.arrays
    names = one.records[0]["layers"]
    chosen = [names[i] for i in np.linspace(1, len(names) - 1, min(spec["columns"], len(names) - 1)).round().astype(int)]
    titles = ["Image", "∇f ⊙ x", *(f"layer {names.index(name)}" for name in chosen), "FullGrad"]
    figure, grid = _grid(len(arrays["images"]), len(titles), titles)
    rows: list[Row] = []
    for i, axes in enumerate(grid):
        picture(axes[0], arrays["images"][i])
        _name(axes[0], one, i)
        maps = {name: arrays[f"layer/{name}"] for name in (names[0], *chosen)} | {"sum": arrays["maps"]}
        for panel, (name, values) in zip(axes[1:], maps.items(), strict=True):
            draw_map(panel, values[i], None)
            rows.append({"image": i, "column": name, **_facts(one, i), **_spread(values[i])})
    return figure, rows


def draw_map(axes: Axes, values: np.ndarray, image: np.ndarray | None) -> None:
    """Draw a map (H, W): bright if large, red and blue if it has negative values; over `image` if given."""
    values = values.astype(float)
    if (values < 0).any():
        limit = np.percentile(np.abs(values), CLIP) or 1.0
        axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit)
        return
    low, high = values.min(), np.percentile(values, CLIP)
    strength = np.clip((values - low) / (high - low if high > low else 1), 0, 1)
    if image is None:
        axes.imshow(strength, cmap=MAP, vmin=0, vmax=1)
    else:
        axes.imshow(blended(strength, image))


def blended(strength: np.ndarray, image: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """A map (H, W) in [0, 1] over an image (C, H, W) uint8, which is visible where the map is small. -> (H, W, 3) in [0, 1].

    colours: of the map, (H, W, 3); None for those of its values.
    """
    if colours is None:
        colours = mpl.colormaps[OVERLAY](strength)[..., :3]
    grey = (image.astype(float).transpose(1, 2, 0) / 255).mean(2, keepdims=True).repeat(3, axis=2)
    opacity = MOST_OVERLAID * strength[..., None]
    mixed: np.ndarray = (1 - opacity) * (0.35 + 0.6 * grey) + opacity * colours
    return mixed


def picture(axes: Axes, image: np.ndarray) -> None:
    """Show an image (C, H, W) uint8, C of 1 or 3."""
    axes.imshow(image.repeat(3, axis=0).transpose(1, 2, 0) if len(image) == 1 else image.transpose(1, 2, 0))


def _grid(lines: int, columns: int, titles: Sequence[str]) -> tuple[Figure, Any]:
    side = PAGE_WIDTH / columns
    figure = Figure(figsize=(PAGE_WIDTH, lines * side + 0.22))
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=7.5, pad=3)
    return figure, grid


def _facts(one: Series, i: int) -> Row:
    record = one.records[0]
    return {"label": record["labels"][i], "name": record["names"][i], "run": record["id"]}


def _name(axes: Axes, one: Series, i: int) -> None:
    """Write the class of an image along its left side."""
    words = textwrap.fill(one.records[0]["names"][i].partition(",")[0], 14)
    axes.text(-0.04, 0.5, words, rotation=90, ha="right", va="center", fontsize=6.5, transform=axes.transAxes)


def _spread(values: np.ndarray) -> Row:
    numbers = values.astype(float)
    return {"mean": f"{numbers.mean():.4g}", "smallest": f"{numbers.min():.4g}", "largest": f"{numbers.max():.4g}"}
