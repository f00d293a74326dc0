"""A picture at its own size, and the saliency maps of several methods over it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from gradexp.report.draw.gallery import CLIP, MAP, SIGNED, blended
from gradexp.report.figures import STYLE

DPI = 100  # panels are measured in pixels
SMALLEST, LARGEST = 480, 2400  # pixels on the long side of a panel

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
    box = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
    with mpl.rc_context(STYLE):
        page = Page.of(photo.size, 1 + len(maps), title)
        pixels = np.asarray(photo)
        page.panel(0, 0).imshow(pixels, extent=page.extent, interpolation="none")
        page.write(page.panel(1, 0), predictions)
        for column, (name, values) in enumerate(maps.items(), 1):
            over, alone = page.panel(0, column, name), page.panel(1, column)
            over.imshow(laid_over(values, pixels, box), extent=page.extent, interpolation="none")
            alone.imshow(coloured(values), extent=(box[0], box[2], box[3], box[1]), interpolation="nearest")
            for axes in (over, alone):
                page.frame(axes, box)
        content = io.BytesIO()
        page.figure.savefig(content, format=kind, dpi=DPI)
    return content.getvalue()


@dataclass(frozen=True)
class Page:
    """A figure of two rows of panels of (width, height) pixels each. line: the height of a line of text in pixels."""

    figure: Figure
    width: int
    height: int
    line: int

    @classmethod
    def of(cls, panel: tuple[int, int], columns: int, title: str) -> Page:
        width, height = panel
        line = max(14, min(panel) // 20)
        total = columns * (width + line) + line
        lines = wrapped(title, total - 2 * line, line)
        size = (total, 2 * (height + 2 * line) + line * (len(lines) + 2))
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
        figure.set_layout_engine("none")
        page = cls(figure, width, height, line)
        figure.text(line / size[0], 1 - 0.5 * line / size[1], "\n".join(lines), fontsize=page.points, va="top")
        return page

    @property
    def points(self) -> float:
        return 0.75 * self.line * 72 / DPI

    @property
    def extent(self) -> Box:
        """Of an image that fills a panel, as matplotlib has it: left, right, bottom, top."""
        return 0, self.width, self.height, 0

    def panel(self, row: int, column: int, caption: str = "") -> Axes:
        """Axes in pixels of the picture, y downwards."""
        size = self.figure.get_size_inches() * DPI
        left, bottom = self.line + column * (self.width + self.line), self.line + (1 - row) * (self.height + 2 * self.line)
        axes: Axes = self.figure.add_axes(
            (left / size[0], bottom / size[1], self.width / size[0], self.height / size[1]), autoscale_on=False
        )
        axes.set(xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        axes.text(0, -0.4 * self.line, caption, fontsize=self.points, va="bottom")
        return axes

    def write(self, axes: Axes, texts: Sequence[str]) -> None:
        lines = [line for text in texts for line in wrapped(text, self.width, self.line)]
        axes.text(0, 0, "\n".join(lines), fontsize=self.points, va="top", linespacing=1.5)

    def frame(self, axes: Axes, box: Box) -> None:
        """Frame a part of the picture, unless it is all of it."""
        if box != (0, 0, self.width, self.height):
            left, top, right, bottom = box
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, ec="black", lw=self.points / 10))


def laid_over(values: np.ndarray, pixels: np.ndarray, box: Box) -> np.ndarray:
    """A map (h, w) over the part `box` of a picture (H, W, 3) uint8, which is pale elsewhere. -> (H, W, 3) in [0, 1]."""
    left, top, right, bottom = (round(edge) for edge in box)
    scaled = Image.fromarray(normalised(values).astype(np.float32)).resize((right - left, bottom - top))
    large = np.asarray(scaled).clip(-1, 1)  # bicubic values overshoot
    drawn: np.ndarray = 0.6 + 0.4 * pixels.astype(np.float32) / 255
    image = pixels[top:bottom, left:right].transpose(2, 0, 1)
    if (values < 0).any():
        drawn[top:bottom, left:right] = blended(np.abs(large), image, mpl.colormaps[SIGNED](0.5 + 0.5 * large)[..., :3])
    else:
        drawn[top:bottom, left:right] = blended(large.clip(0), image)
    return drawn


def coloured(values: np.ndarray) -> np.ndarray:
    """A map (h, w) in colours, (h, w, 4)."""
    scaled = normalised(values)
    colours: np.ndarray = mpl.colormaps[SIGNED](0.5 + 0.5 * scaled) if (values < 0).any() else mpl.colormaps[MAP](scaled)
    return colours


def normalised(values: np.ndarray) -> np.ndarray:
    """A map scaled to [0, 1], or to [-1, 1] if it has negative values; the largest values are clipped."""
    values = values.astype(float)
    low = 0.0 if (values < 0).any() else values.min()
    high = np.percentile(np.abs(values), CLIP)
    scaled: np.ndarray = np.clip((values - low) / (high - low if high > low else 1), -1, 1)
    return scaled


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
