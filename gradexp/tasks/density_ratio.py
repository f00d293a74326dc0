"""Figure 5.1: ratios of the implicit density of a classifier under input noise (§5.5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gradexp.base.ranges import Count, Sigmas
from gradexp.engine.evaluation import Evaluation, PerImageTask, Statistics
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.density_ratio import density_ratio

BATCH = 256


@dataclass(kw_only=True)
class DensityRatio(PerImageTask):
    """Metrics: the curves of evaluate.density_ratio over `sigma`; `mean_log_ratio`, the mean of `density_ratio/log`.

    sigmas: standard deviations of the noise. images: test images, None for all. statistics: see Evaluation.model, `clean`.
    """

    sigmas: Sigmas
    images: Count | None = None
    statistics: Statistics = None

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model = evaluation.model("model", clean=self.statistics)
        batches, seed = evaluation.batches(self.images, BATCH), run.config["seed"]
        metrics: dict[str, Any] = density_ratio(model, batches, sigmas=self.sigmas, seed=seed)
        metrics["mean_log_ratio"] = float(np.mean(metrics["density_ratio/log"]))
        return evaluation.result(metrics, keep=["sigma"])
