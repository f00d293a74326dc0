"""Figures 5.3 and 5.6: accuracy after the pixels of least gradient saliency are removed (§5.5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

from gradexp import gradients
from gradexp.base.ranges import Count, Fraction
from gradexp.engine.evaluation import Evaluation, PerImageTask, Statistics, as_bytes
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate import discriminative_perturbation as perturbation
from gradexp.evaluate.spectrum import high_frequency

BATCH = 256


Spaced = TypedDict("Spaced", {"from": Fraction, "to": Fraction, "count": Count})  # log-spaced fractions of the pixels


@dataclass(kw_only=True)
class DiscriminativePerturbation(PerImageTask):
    """Accuracy of the upstream run `model` on images whose pixels are removed by the gradients of the upstream run `explainer`.

    Metrics: the curves of evaluate.discriminative_perturbation over `removed`; `mean_accuracy`, the mean of the first;
    `gradient/high_frequency`, percent, of the explainer's gradients of the labels' logits. Arrays: the first `shown` images and
    these gradients (Figures 5.4 and 5.7).
    fractions: log-spaced, of all pixels. saliency, target, replacement: see evaluate.discriminative_perturbation.
    images: test images, None for all.
    """

    fractions: Spaced
    saliency: str
    target: str
    replacement: str | float
    shown: Count
    images: Count | None = None
    statistics: Statistics = None

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        perturbation.check(**self.options())

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation, options = Evaluation(run, upstream), self.options()
        model, explainer = (evaluation.model(name, clean=self.statistics) for name in ("model", "explainer"))
        rows = evaluation.rows(self.images, BATCH)

        def count(_: int, rows: Tensor) -> Tensor:
            return perturbation.count_correct(model, explainer, evaluation.batch(rows), seed=run.config["seed"], **options)

        counts = evaluation.pieces.each("perturbed", rows, count)
        metrics: dict[str, Any] = perturbation.accuracies(options["fractions"], torch.stack(counts).sum(0))
        metrics["mean_accuracy"] = float(np.mean(metrics["accuracy"]))
        metrics["gradient/high_frequency"] = gradient_noise(evaluation, explainer, rows)
        batch = next(evaluation.batches(self.shown, self.shown))
        gradient = gradients.input_gradient(explainer, batch.images, batch.labels)
        shown = {"images": as_bytes(batch.images), "gradients": gradient.nan_to_num(0).cpu().numpy().astype(np.float16)}
        return evaluation.result(metrics, shown, keep=["removed"])

    def options(self) -> dict[str, Any]:
        """The options of perturbation.count_correct."""
        low, high = np.log10(self.fractions["from"]), np.log10(self.fractions["to"])
        fractions = np.logspace(low, high, self.fractions["count"]).round(6).tolist()
        return {"fractions": fractions, "kind": self.saliency, "target": self.target, "replacement": self.replacement}


def gradient_noise(evaluation: Evaluation, model: nn.Module, rows: Sequence[Tensor]) -> float:
    """Percentage of the energy of the label's logit-gradient at high frequencies (high_frequency), a mean over test images."""
    batches = map(evaluation.batch, rows)
    shares = [high_frequency(gradients.input_gradient(model, batch.images, batch.labels)).cpu() for batch in batches]
    return float(torch.cat(shares).nanmean())
