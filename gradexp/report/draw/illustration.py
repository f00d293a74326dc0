"""Figure 2.1: teacher and students on the line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series

# (title, ((array, label, line style), ...)) of each panel
PANELS = (
    ("Matching the data points", (("activations", "student: values", "-"),)),
    (
        "With noise on the inputs, or slopes",
        (("noise", "student: values, noisy inputs", "--"), ("jacobian", "student: values and slopes", "-")),
    ),
)
COLOURS = {"activations": PALETTE[1], "noise": PALETTE[4], "jacobian": PALETTE[0]}
TANGENT = 0.28  # half the length of a tangent, in units of x


def illustration(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """Two panels: a student that matches values alone; students that match slopes, explicitly and through noise."""
    arrays = series[0].arrays[0]
    figure = Figure(figsize=(2 * COLUMN_WIDTH, 0.95 * COLUMN_WIDTH))
    for axes, (title, students) in zip(figure.subplots(1, 2, sharey=True), PANELS, strict=True):
        axes.plot(arrays["x"], arrays["teacher"], color="black", linewidth=1.0, label="teacher")
        for name, label, style in students:
            axes.plot(arrays["x"], arrays[name], style, color=COLOURS[name], label=label)
        if len(students) > 1:
            _tangents(axes, arrays)
        axes.plot(arrays["points"], arrays["values"], "o", color="black", markersize=4, label="data points", zorder=3)
        axes.set(title=title, xlabel="input x")
    entries = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=-(-len(entries) // 2))
    figure.axes[0].set_ylabel("output")
    names = ("teacher", *COLOURS)
    rows: list[Row] = [
        {"x": f"{x:.4f}"} | {name: f"{arrays[name][i]:.5f}" for name in names} for i, x in enumerate(arrays["x"])
    ]
    return figure, rows


def _tangents(axes: Axes, arrays: dict[str, Any]) -> None:
    for x, y, slope in zip(arrays["points"], arrays["values"], arrays["slopes"], strict=True):
        half = TANGENT / (1 + slope**2) ** 0.5
        ends = [x - half, x + half], [y - half * slope, y + half * slope]
        axes.plot(*ends, color="black", linewidth=2.6, alpha=0.35, label="teacher's slopes")
