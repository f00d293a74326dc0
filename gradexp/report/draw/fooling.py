"""Figure 5.5: the energy of gradients inside a mask, before and after fooling."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from gradexp.engine.run import Config
from gradexp.report.draw.images import bare, red_over, show
from gradexp.report.figures import COLUMN_WIDTH, Row, Series


def fooling(spec: Config, series: Sequence[Series]) -> tuple[Figure, list[Row]]:
    """One image a row: the mask, and each gradient of `columns` in red over the image, with its mean energy in the mask.

    spec: `columns`: [{label, array, metric}]; further `metrics` and `thesis`, {metric: number}, for the CSV file. Only the
    first series is drawn; the CSV file has the metrics of all.
    """
    one, *others = series
    arrays, images = one.arrays[0], one.arrays[0]["images"]
    heads = [("mask", "energy/uniform"), *((column["label"], column["metric"]) for column in spec["columns"])]
    width = 2 * COLUMN_WIDTH
    figure = Figure(figsize=(width, width / len(heads) * len(images) + 0.5))
    axes = figure.subplots(len(images), len(heads), squeeze=False)
    for i, line in enumerate(axes):
        maps = [arrays["mask"], *(arrays[column["array"]][i] for column in spec["columns"])]
        for panel, saliency in zip(line, maps, strict=True):
            show(panel, red_over(images[i], saliency))
            bare(panel)
    energies = [one.metric(metric)[0] for _, metric in heads]
    for panel, (label, _), energy in zip(axes[0], heads, energies, strict=True):
        panel.set_title(f"{label}\n{energy:.1f} %")
    before, after = (one.metric(f"test/accuracy{when}")[0] for when in ("/before", ""))
    figure.suptitle(f"test accuracy {before:.1f} % before, {after:.1f} % after", fontsize=8)
    figure.set_layout_engine("constrained", w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    rows: list[Row] = [
        {"what": label, "percent": f"{one.metric(metric)[0]:.4g}", "thesis": spec.get("thesis", {}).get(metric, "")}
        for label, metric in [*heads, *((name, name) for name in spec["metrics"])]
    ]
    rows += [
        {"what": f"{other.label}: {metric}", "percent": f"{other.metric(metric)[0]:.4g}", "thesis": ""}
        for other in others
        for metric in dict.fromkeys([metric for _, metric in heads] + spec["metrics"])
    ]
    return figure, rows
