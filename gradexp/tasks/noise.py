"""Table 2.2: a trained model's test accuracy under noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from gradexp.base.ranges import Count, NonNegative
from gradexp.engine.evaluation import Evaluation, EvaluationTask
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream, images_of
from gradexp.evaluate.accuracy import EVALUATION_BATCH
from gradexp.evaluate.noise import noise_accuracies


@dataclass(kw_only=True)
class Noise(EvaluationTask):
    """`test/accuracy@noise=SIGMA` (percent), the mean over draws; with `/std`, their standard deviation (of the sample).

    A model that diverged gives a run that diverged.
    """

    sigmas: Sequence[NonNegative]
    draws: Count

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look = Evaluation(run, upstream)
        model = look.model("model")
        batches = look.data.test_loader(batch_size=EVALUATION_BATCH, device=look.hardware.device)
        common = {"seed": run.config["seed"], "classes": look.data.classes, "device": look.hardware.device}
        metrics: dict[str, Any] = {}

        def measured(_: int, sigma: float) -> list[float]:
            draws = self.draws if sigma else 1
            return [nan] * draws if look.diverged else noise_accuracies(model, batches, sigma=sigma, draws=draws, **common)

        found = look.pieces.each("noise", self.sigmas, measured, count=len(self.sigmas))
        for sigma, values in zip(self.sigmas, found, strict=True):
            metrics[f"test/accuracy@noise={sigma:g}"] = round(float(np.mean(values)), 4)
            if len(values) > 1:
                metrics[f"test/accuracy@noise={sigma:g}/std"] = round(float(np.std(values, ddof=1)), 4)
        return look.result(metrics)

    def work(self, config: Config, sizes: Sizes) -> float | None:
        test = images_of(config, sizes)[1]
        return None if test is None else float(test * (1 + self.draws * (len(self.sigmas) - 1)))

    def shortened(self, config: Config, n: int) -> Config | None:
        return config | {"task": config["task"] | {"draws": n, "sigmas": self.sigmas[:2]}}
