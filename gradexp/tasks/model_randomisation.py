"""Similarity of saliency maps before and after layers of the model are randomised (Adebayo et al., 2018; §3.4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.model_randomisation import UNTOUCHED, layers_from_output, maps_of, randomise, rank_correlation
from gradexp.saliency.method import predicted
from gradexp.tasks.saliency_score import ScoringTask


class ModelRandomisation(ScoringTask):
    """Rank correlation of maps with those of the trained model, as its layers are randomised one after another from the output.

    All maps are of the class that the trained model predicts, and a method draws the same noise for every model. Metrics are
    curves over `randomised`, the number of randomised layers: `correlation`, the mean over images, and `correlation/std`;
    `test/correlation` is the last value, with all layers randomised. A model that diverged makes the run `diverged`.
    """

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation, model, method = self.parts(run, upstream)
        if evaluation.diverged:
            return evaluation.result({})
        seed = run.config["seed"]
        batches = [evaluation.batch(rows).images for rows in self.rows(evaluation)]
        classes = [predicted(model, images, None) for images in batches]
        groups = layers_from_output(model)
        original = maps_of(model, method, batches, classes, seed)

        def correlate(_: int, layers: list[list[str]]) -> Tensor:
            randomise(model, layers, seed)
            return rank_correlation(original, maps_of(model, method, batches, classes, seed))

        randomised = [groups[:count] for count in range(1, len(groups) + 1)]
        correlations = [torch.ones(len(original)), *evaluation.pieces.each("layers", randomised, correlate)]
        facts = {"images": len(original), "layers": [UNTOUCHED, *(" and ".join(names) for names in groups)]}
        return Result(curves(correlations), facts={**facts, **evaluation.facts()})


def curves(correlations: list[Tensor]) -> dict[str, Any]:
    """Metrics from the correlations of all images, (N,), with 0, 1, 2, ... layers randomised."""
    means = [float(values.double().mean()) for values in correlations]
    deviations = [float(values.double().std()) for values in correlations]
    metrics: dict[str, Any] = {"randomised": list(range(len(means))), "correlation": means, "correlation/std": deviations}
    return metrics | {"test/correlation": means[-1], "test/correlation/std": deviations[-1]}
