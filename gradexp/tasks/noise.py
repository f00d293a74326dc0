"""Table 2.2: test accuracy of a trained model under input noise (§2.6.2)."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from gradexp.base.ranges import Count, Sigmas
from gradexp.engine.evaluation import Evaluation, EvaluationTask
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream, images_of
from gradexp.evaluate.accuracy import EVALUATION_BATCH
from gradexp.evaluate.noise import noise_accuracies


@dataclass(kw_only=True)
class Noise(EvaluationTask):
    """Metrics: `test/accuracy@noise=SIGMA`, percent, a mean over draws of the noise; `/std`, standard deviation (draws - 1).

    sigmas: standard deviations of the noise, in the units of normalised images; 0 has one draw. A model that diverged makes the
    run `diverged`.
    """

    sigmas: Sigmas
    draws: Count

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model = evaluation.model("model")
        batches = evaluation.data.test_loader(batch_size=EVALUATION_BATCH, device=evaluation.hardware.device)
        common = {"seed": run.config["seed"], "classes": evaluation.data.classes, "device": evaluation.hardware.device}
        metrics: dict[str, Any] = {}

        def measure(_: int, sigma: float) -> list[float]:
            draws = self.draws if sigma else 1
            if evaluation.diverged:
                return [nan] * draws
            return noise_accuracies(model, batches, sigma=sigma, draws=draws, **common)

        accuracies = evaluation.pieces.each("noise", self.sigmas, measure)
        for sigma, values in zip(self.sigmas, accuracies, strict=True):
            metrics[f"test/accuracy@noise={sigma:g}"] = round(float(np.mean(values)), 4)
            if len(values) > 1:
                metrics[f"test/accuracy@noise={sigma:g}/std"] = round(float(np.std(values, ddof=1)), 4)
        return evaluation.result(metrics)

    def work(self, config: Config, sizes: Sizes) -> float | None:
        test = images_of(config, sizes)[1]
        return None if test is None else float(test * (1 + self.draws * (len(self.sigmas) - 1)))
