"""§5.2 and §5.7.1 as one figure: gradients that move while the loss does not."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.draw.images import bare, show, signed
from gradexp.report.figures import COLUMN_WIDTH, PALETTE, Row, Series

HEADS = {
    "images": "image",
    "logit_before": "∇f",
    "logit_after": "∇(f + g)",
    "loss_before": "∇ℓ",
    "loss_after": "∇ℓ of f + g",
}


def shift(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """(a) gradients before and after a function is added to all logits; (b) what a small sine adds to the loss."""
    one = series[0]
    arrays = one.arrays[0]
    count, width = len(arrays["images"]), 2 * COLUMN_WIDTH
    figure = Figure(figsize=(width, 0.55 * width))
    halves = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    axes = left.subplots(count, len(HEADS), squeeze=False)
    for line, i in zip(axes, range(count), strict=True):
        for panel, name in zip(line, HEADS, strict=True):
            show(panel, arrays[name][i] if name == "images" else signed(arrays[name])[i])
            bare(panel)
    for panel, head in zip(axes[0], HEADS.values(), strict=True):
        panel.set_title(head)
    left.suptitle("(a) g(x) = a⟨p, x⟩ added to all logits", fontsize=8)

    x = one.metric("sine/frequency")[0]
    curves = {
        "change of the loss": "sine/loss_change",
        "change of ∇ℓ (L1)": "sine/gradient_change",
        "mεD": "sine/gradient_bound",
    }
    plot = right.subplots()
    for (label, name), colour, style in zip(curves.items(), PALETTE, ("-o", "-o", "--"), strict=False):
        plot.plot(x, one.metric(name)[0], style, color=colour, label=label, markersize=3)
    plot.set(xscale="log", yscale="log", xlabel="m", title="(b) ε sin(m Σx) added to the loss")
    plot.legend()
    rows: list[Row] = [{"what": name, "m": "", "value": f"{one.metric(name)[0]:.4g}"} for name in spec["metrics"]]
    rows += [
        {"what": label, "m": f"{m:g}", "value": f"{value:.4g}"}
        for label, name in curves.items()
        for m, value in zip(x, one.metric(name)[0], strict=True)
    ]
    return figure, rows
