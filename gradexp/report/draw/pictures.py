"""Pictures in rows: samples, gradients, and saliency maps beside or over images."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradexp.base.errors import UserError
from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series
from gradexp.report.specs import FigureSpec

WIDTH = 2 * COLUMN_WIDTH
MAP = "inferno"  # dark to bright in even steps, also in grey and for the colour-blind
SIGNED = "RdBu_r"
OVERLAY = "YlOrRd"
LETTERS = 16  # of a title, for each inch of its panel
CLIP = 99.5  # percentile of a map that is drawn brightest, so that one pixel does not darken all others
MOST_OVERLAID = 0.85  # largest opacity of a map over its image


def samples(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """A row of pictures for each series, below a row for each array in `above` of the first series.

    spec: `array`, the pictures of a series; `signed`, whether they are gradients (each is rescaled around grey);
    `above`: {array: label}; `beside`: {array: metric}, a number shown below the label; `metrics`: columns of the CSV file.
    """
    lines = [(series[0], label, array) for array, label in spec.get("above", {}).items()]
    lines += [(one, one.label, spec["array"]) for one in series]
    count = max(len(one.arrays[0][array]) for one, _, array in lines)
    figure, grid = _grid(len(lines), count, (WIDTH - 1.1) / count * len(lines) + 0.1)
    for axes, (one, label, array) in zip(grid, lines, strict=True):
        pictures = one.arrays[0][array]
        if array == spec["array"] and spec.get("signed"):
            pictures = signed(pictures)
        for panel, picture in zip(axes, pictures, strict=False):
            show(panel, picture)
        metric = spec.get("beside", {}).get(array)
        if one.records[0]["status"] == "diverged":
            label += "\n(diverged)"
        elif metric:
            label += f"\n{one.metric(metric)[0]:.3f}"
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
    return figure, [
        {"series": one.label, **{name: f"{one.metric(name)[0]:.5g}" for name in spec["metrics"]}, "run": one.runs[0].id}
        for one in series
    ]


def fooling(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a row: the mask, and each gradient of `columns` in red over the image, with its mean energy in the mask.

    Above the first column is the test accuracy before and after.

    spec: `columns`: [{label, array, metric}]; further `metrics` and `thesis`, {metric: number}, for the CSV file. Only the
    first series is drawn; the CSV file has the metrics of all.
    """
    one, *others = series
    arrays, images = one.arrays[0], one.arrays[0]["images"]
    columns: Any = spec["columns"]
    heads = {"mask": "energy/uniform"} | {column["label"]: column["metric"] for column in columns}
    before, after = (one.metric(f"test/accuracy{when}")[0] for when in ("/before", ""))
    titles = [f"{label}\n{one.metric(metric)[0]:.1f} %" for label, metric in heads.items()]
    titles[0] = f"accuracy {before:.1f}→{after:.1f} %\n{titles[0]}"
    figure, grid = _grid(len(images), len(heads), WIDTH / len(heads) * len(images) + 0.5, titles)
    for i, axes in enumerate(grid):
        maps = [arrays["mask"], *(arrays[column["array"]][i] for column in columns)]
        for panel, saliency in zip(axes, maps, strict=True):
            show(panel, red_over(images[i], saliency))
    printed: Any = spec.get("thesis", {})
    own = heads | {metric: metric for metric in spec["metrics"]}
    listed = [(one, label, metric, printed.get(metric, "")) for label, metric in own.items()]
    listed += [(other, f"{other.label}: {metric}", metric, "") for other in others for metric in dict.fromkeys(own.values())]
    return figure, [
        {"what": what, "percent": f"{shown.metric(metric)[0]:.4g}", "thesis": thesis} for shown, what, metric, thesis in listed
    ]


HEADS = {
    "images": "image",
    "logit_before": "∇f",
    "logit_after": "∇(f + g)",
    "loss_before": "∇ℓ",
    "loss_after": "∇ℓ of f + g",
}
CHANGES = {
    "change of the loss": "sine/loss_change",
    "change of ∇ℓ (L1)": "sine/gradient_change",
    "mεD": "sine/gradient_bound",
}


def shift(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """(a) gradients before and after a function is added to all logits; (b) what a small sine adds to the loss (§5.2, §5.7)."""
    one = series[0]
    arrays = one.arrays[0]
    figure = Figure(figsize=(WIDTH, 0.55 * WIDTH))
    halves = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    grid = left.subplots(len(arrays["images"]), len(HEADS), squeeze=False)
    for name, head, axes in zip(HEADS, HEADS.values(), grid.T, strict=True):
        for panel, values in zip(axes, arrays[name] if name == "images" else signed(arrays[name]), strict=True):
            _bare(panel)
            show(panel, values)
        axes[0].set_title(head)
    left.suptitle("(a) g(x) = a⟨p, x⟩ added to all logits", fontsize=8)

    x = one.metric("sine/frequency")[0]
    rows: list[Row] = [{"what": name, "m": "", "value": f"{one.metric(name)[0]:.4g}"} for name in spec["metrics"]]
    plot = right.subplots()
    for (label, name), colour, style in zip(CHANGES.items(), PALETTE, ("-o", "-o", "--"), strict=False):
        values = one.metric(name)[0]
        plot.plot(x, values, style, color=colour, label=label, markersize=3)
        rows += [{"what": label, "m": f"{m:g}", "value": f"{value:.4g}"} for m, value in zip(x, values, strict=True)]
    plot.set(xscale="log", yscale="log", xlabel="m", ylabel="size of the change", title="(b) ε sin(m Σx) added to the loss")
    plot.legend()
    return figure, rows


# --- saliency maps (figs. 3.1, 3.3, 3.4) --------------------------------------------------------------------


class Maps(NamedTuple):
    """A column of a gallery."""

    title: str
    name: str  # in the CSV file
    series: Series
    values: np.ndarray  # (N, H, W)
    overlay: bool = False


def gallery(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a line, one method a column, from the arrays `images` and `maps` of each series.

    spec: `first` and `rows` select the images; `overlay` of a series draws its maps over them.
    """
    images = series[0].arrays[0]["images"]
    if any(not np.array_equal(one.arrays[0]["images"], images) for one in series):
        raise UserError(f"figure {spec['number']}: its runs have different images; delete their records and run again")
    columns = [Maps(one.label, one.label, one, one.arrays[0]["maps"], bool(one.spec.get("overlay"))) for one in series]
    return _gallery(images, columns, range(spec["first"], min(spec["first"] + spec["rows"], len(images))))


def layers(spec: FigureSpec, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a line: the image, ∇f ⊙ x, the bias-gradients of `columns` evenly spaced layers, and FullGrad."""
    (one,) = series
    (arrays,) = one.arrays
    names = one.records[0]["layers"]
    count: Any = spec["columns"]
    chosen = np.linspace(1, len(names) - 1, min(count, len(names) - 1)).round().astype(int)
    titles = {"∇f ⊙ x": names[0]} | {f"layer {i}": names[i] for i in chosen}
    columns = [Maps(title, name, one, arrays[f"layer/{name}"]) for title, name in titles.items()]
    columns.append(Maps("FullGrad", "sum", one, arrays["maps"]))
    return _gallery(arrays["images"], columns, range(len(arrays["images"])))


def _gallery(images: np.ndarray, columns: Sequence[Maps], chosen: Iterable[int]) -> tuple[Figure, list[Row]]:
    """The chosen images (N, C, H, W), one per line, beside their maps."""
    lines, titles = list(chosen), ["Image", *(column.title for column in columns)]
    figure, grid = _grid(len(lines), len(titles), len(lines) * WIDTH / len(titles) + 0.22, titles)
    rows: list[Row] = []
    for axes, i in zip(grid, lines, strict=True):
        show(axes[0], images[i])
        name = columns[0].series.records[0]["names"][i].partition(",")[0]
        axes[0].set_ylabel(textwrap.fill(name, 14), fontsize=6.5)
        for panel, column in zip(axes[1:], columns, strict=True):
            draw_map(panel, column.values[i], images[i] if column.overlay else None)
            record, values = column.series.records[0], column.values[i].astype(float)
            facts = {"label": record["labels"][i], "name": record["names"][i], "run": record["id"]}
            range_ = {"mean": values.mean(), "smallest": values.min(), "largest": values.max()}
            rows.append({"image": i, "column": column.name, **facts, **{key: f"{x:.4g}" for key, x in range_.items()}})
    return figure, rows


def draw_map(axes: Axes, values: np.ndarray, image: np.ndarray | None = None) -> None:
    """Draw a map (H, W): bright if large, red and blue if it has negative values; otherwise over `image` if given."""
    axes.imshow(coloured(values) if image is None or (values < 0).any() else blended(normalised(values), image))


def normalised(values: np.ndarray) -> np.ndarray:
    """A map scaled to [0, 1], or to [-1, 1] if it has negative values; the largest values are clipped."""
    values = values.astype(float)
    low = 0.0 if (values < 0).any() else values.min()
    high = np.percentile(np.abs(values), CLIP)
    scaled: np.ndarray = np.clip((values - low) / (high - low if high > low else 1), -1, 1)
    return scaled


def coloured(values: np.ndarray) -> np.ndarray:
    """A map (h, w) in colours, (h, w, 4)."""
    scaled = normalised(values)
    colours: np.ndarray = mpl.colormaps[SIGNED](0.5 + 0.5 * scaled) if (values < 0).any() else mpl.colormaps[MAP](scaled)
    return colours


def blended(strength: np.ndarray, image: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """A map (H, W) in [0, 1] over an image (C, H, W) uint8, which is visible where the map is small. -> (H, W, 3) in [0, 1].

    colours: of the map, (H, W, 3); None for those of its values.
    """
    if colours is None:
        colours = mpl.colormaps[OVERLAY](strength)[..., :3]
    grey = image.mean(0)[..., None] / 255
    opacity = MOST_OVERLAID * strength[..., None]
    mixed: np.ndarray = (1 - opacity) * (0.35 + 0.6 * grey) + opacity * colours
    return mixed


# --- panels -------------------------------------------------------------------------------------------------


def _grid(lines: int, columns: int, height: float, titles: Sequence[str] = ()) -> tuple[Figure, Any]:
    """A figure as wide as a page, and its panels (lines, columns) with titles above the first line."""
    titles = [textwrap.fill(title, int(LETTERS * WIDTH / columns)) for title in titles]
    more_lines = max((title.count("\n") for title in titles), default=0)
    figure = Figure(figsize=(WIDTH, height + 0.16 * more_lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    for axes in grid.flat:
        _bare(axes)
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(title)
    return figure, grid


def _bare(axes: Axes) -> None:
    """Remove ticks, frame and grid."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def show(axes: Axes, picture: Any) -> None:
    """Show a picture (C, H, W), uint8 or in [0, 1], C of 1 or 3."""
    axes.imshow(np.moveaxis(picture if len(picture) == 3 else picture.repeat(3, 0), 0, 2))


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
