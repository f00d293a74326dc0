"""Figure 5.1: how the density of a classifier changes with noise on the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradexp.base.ranges import Count, NonNegative
from gradexp.engine.evaluation import Evaluation, PerImageTask, Statistics
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate import density_ratio

BATCH = 256


@dataclass(kw_only=True)
class DensityRatio(PerImageTask):
    """Curves over `sigma` (evaluate.density_ratio); `mean_log_ratio` is the mean of the logarithm's curve."""

    sigmas: Sequence[NonNegative]
    images: Count | None = None
    statistics: Statistics = None

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look = Evaluation(run, upstream)
        model = look.model("model", clean=self.statistics)
        how = {"sigmas": self.sigmas, "seed": run.config["seed"]}
        metrics: dict[str, Any] = density_ratio.density_ratio(model, look.batches(self.images, BATCH), **how)
        metrics["mean_log_ratio"] = float(np.mean(metrics["density_ratio/log"]))
        return look.result(metrics, keep=["sigma"])
