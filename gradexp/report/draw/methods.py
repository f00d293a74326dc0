"""The line style of each saliency method in the figures of Chapter 3, distinguishable without colour."""

from __future__ import annotations

from typing import Any

from gradexp.base.errors import UserError, nearest

# colour (Okabe and Ito's), marker, dashes. Variants of a method share its colour.
METHODS = {
    "Random": ("#999999", "x", "-"),
    "Input-gradient": ("#0072B2", "s", "-"),
    "Integrated gradients": ("#CC79A7", "^", "-"),
    "SmoothGrad": ("#E69F00", "v", (0, (4, 2))),
    "SmoothGrad-squared": ("#E69F00", "v", (0, (4, 2))),
    "Grad-CAM": ("#009E73", "D", "-"),
    "Grad-CAM, 4x4": ("#009E73", "d", (0, (2, 1.5))),
    "FullGrad": ("#D55E00", "o", "-"),
    "FullGrad, Eq. 3.2": ("#D55E00", "P", (0, (4, 2))),
    "FullGrad, no abs": ("#D55E00", "*", (0, (1, 1.5))),
}


def style(label: str) -> dict[str, Any]:
    """Arguments of `plot` for a method. Random's line is broad and below the others, so that none hides it."""
    if label not in METHODS:
        raise UserError(f"series {label!r} has no style in gradexp/report/draw/methods.py{nearest(label, METHODS)}")
    colour, marker, dashes = METHODS[label]
    below = {"linewidth": 3.0, "alpha": 0.6, "zorder": 1} if label == "Random" else {"zorder": 3 if "FullGrad" in label else 2}
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 3.5, "linewidth": 1.2, **below}
