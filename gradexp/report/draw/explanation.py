"""A picture at its own size, and the saliency maps of several methods over it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from gradexp.report.draw.pictures import SIGNED, blended, coloured, normalised
from gradexp.report.figures import STYLE

DPI = 100  # panels are measured in pixels
SMALLEST, LARGEST = 480, 2400  # pixels on the long side of a picture
NARROWEST = 14  # lines of text to the width of a panel

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def explanation(
    photo: Image.Image, box: Box, maps: Mapping[str, np.ndarray], title: str, predictions: Sequence[str], *, kind: str = "png"
) -> bytes:
    """The content of a file: a picture and its maps, over it in the upper row and alone in the lower, one method a column.

    photo: RGB, drawn pixel for pixel; one of less than SMALLEST pixels is enlarged by a whole factor, one of more than LARGEST
    is reduced. box: the part of it that the maps (h, w) cover, which is framed; the rest is drawn pale. predictions: lines of
    text in the lower left panel. kind: of file.
    """
    photo, factor = fitted(photo)
    width, height = photo.size
    left, top, right, bottom = box = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
    line = max(14, min(photo.size) // 20)  # height of a line of text in pixels
    points = 0.75 * line * 72 / DPI
    across = max(width, NARROWEST * line)
    words = [part for text in predictions for part in wrapped(text, across, line)]
    panel = across, max(height, int(1.5 * line * len(words)))
    with mpl.rc_context(STYLE):
        figure, panels = page(panel, line, 1 + len(maps), title, points)
        pixels, whole = np.asarray(photo), (0, width, height, 0)
        panels[0, 0].imshow(pixels, extent=whole, interpolation="none")
        panels[1, 0].text(0, 0, "\n".join(words), fontsize=points, va="top", linespacing=1.5, parse_math=False)
        for (over, alone), (name, values) in zip(panels.T[1:], maps.items(), strict=True):
            over.text(0, -0.4 * line, name, fontsize=points, va="bottom")
            over.imshow(laid_over(values, pixels, box), extent=whole, interpolation="none")
            alone.imshow(coloured(values), extent=(left, right, bottom, top), interpolation="nearest")
            if box != (0, 0, width, height):
                for axes in (over, alone):
                    frame = Rectangle((left, top), right - left, bottom - top, fill=False, ec="black", lw=points / 10)
                    axes.add_patch(frame)
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=DPI)
    return content.getvalue()


def page(panel: tuple[int, int], line: int, columns: int, title: str, points: float) -> tuple[Figure, Any]:
    """A figure with a title, and two rows of axes in pixels, y downwards; `line` pixels between columns.

    panel: width and height of each axes.
    """
    width, height = panel
    total = columns * (width + line) + line
    heading = wrapped(title, total - 2 * line, line)
    size = total, 2 * (height + 2 * line) + line * (len(heading) + 2)
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
    figure.set_layout_engine("none")
    figure.text(line / size[0], 1 - 0.5 * line / size[1], "\n".join(heading), fontsize=points, va="top", parse_math=False)
    edges = {"left": line / size[0], "right": 1 - line / size[0]}
    edges |= {"bottom": line / size[1], "top": (2 * height + 3 * line) / size[1]}
    panels = figure.subplots(
        2,
        columns,
        squeeze=False,
        gridspec_kw={**edges, "wspace": line / width, "hspace": 2 * line / height},
        subplot_kw={"autoscale_on": False, "xlim": (0, width), "ylim": (height, 0)},
    )
    for axes in panels.flat:
        axes.set_axis_off()
    return figure, panels


def laid_over(values: np.ndarray, pixels: np.ndarray, box: Box) -> np.ndarray:
    """A map (h, w) over the part `box` of a picture (H, W, 3) uint8, which is pale elsewhere. -> (H, W, 3) in [0, 1]."""
    left, top, right, bottom = (round(edge) for edge in box)
    scaled = Image.fromarray(normalised(values).astype(np.float32)).resize((right - left, bottom - top))
    large = np.asarray(scaled).clip(-1, 1)  # bicubic values overshoot
    drawn: np.ndarray = 0.6 + 0.4 * pixels.astype(np.float32) / 255
    image = pixels[top:bottom, left:right].transpose(2, 0, 1)
    colours = mpl.colormaps[SIGNED](0.5 + 0.5 * large)[..., :3] if (values < 0).any() else None
    drawn[top:bottom, left:right] = blended(large.clip(0) if colours is None else np.abs(large), image, colours)
    return drawn


def fitted(photo: Image.Image) -> tuple[Image.Image, float]:
    """The picture at the size at which it is drawn, and its factor of enlargement."""
    longest = max(photo.size)
    factor = -(-SMALLEST // longest) if longest < SMALLEST else min(1.0, LARGEST / longest)
    if factor == 1:
        return photo, 1
    size = (max(1, round(photo.width * factor)), max(1, round(photo.height * factor)))
    return photo.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS), factor


def wrapped(text: str, width: int, line: int) -> list[str]:
    """Lines that fit into `width` pixels. line: the height of a line in pixels."""
    return textwrap.wrap(text, max(12, int(width / (0.46 * line)))) or [""]
