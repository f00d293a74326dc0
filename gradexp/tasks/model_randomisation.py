"""How much of a saliency map is left when layers of the model become random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradexp.data.loader import mix
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.model_randomisation import layers_from_output, randomise, rank_correlation
from gradexp.saliency.method import predicted
from gradexp.tasks.saliency_score import SaliencyTask


class ModelRandomisation(SaliencyTask):
    """Rank correlation of maps with those of the untouched model, layer after layer made random, from the output on.

    All maps are of the class that the untouched model predicts; what a method draws at random is the same for all models.
    Metrics are curves over `randomised`, the number of random layers: `correlation`, the mean over images, and
    `correlation/std`; with all layers random it is `test/correlation`. A model that diverged gives a run that diverged.
    """

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, model, method = self.parts(run, upstream)
        if look.diverged:
            return look.result({})
        wanted, seed = run.config["evaluate"], run.config["seed"]
        batches = list(look.first_images(wanted["images"], wanted["batch_size"])[0])
        classes = [predicted(model, batch.images, None) for batch in batches]
        groups = layers_from_output(model)

        def maps() -> Tensor:
            found = []
            for number, (batch, labels) in enumerate(zip(batches, classes, strict=True)):
                torch.manual_seed(mix(seed, number))  # of noisy copies
                found.append(method(model, batch.images, labels).cpu())
            return torch.cat(found)

        original = maps()

        def correlated(number: int, layers: list[list[str]]) -> Tensor:
            randomise(model, layers, seed)
            return rank_correlation(original, maps())

        states = [groups[:count] for count in range(1, len(groups) + 1)]
        curve = [torch.ones(len(original)), *look.pieces.each("layers", states, correlated, count=len(states))]
        metrics: dict[str, Any] = {
            "randomised": list(range(len(curve))),
            "correlation": [float(values.double().mean()) for values in curve],
            "correlation/std": [float(values.double().std()) for values in curve],
        }
        metrics |= {f"test/{name}": metrics[name][-1] for name in ("correlation", "correlation/std")}
        facts = {"images": len(original), "layers": ["untouched", *(" and ".join(names) for names in groups)]}
        return Result(metrics, facts={**facts, **look.facts()})
