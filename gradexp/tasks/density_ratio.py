"""Figure 5.1: how the density of a classifier changes with noise on the image."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradexp.engine.evaluation import Evaluation, PerImageTask
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate import density_ratio

BATCH = 256


class DensityRatio(PerImageTask):
    """Curves over `sigma` (evaluate.density_ratio); `mean_log_ratio` is the mean of the logarithm's curve."""

    def check_setup(self, look: Evaluation) -> None:
        super().check_setup(look)
        density_ratio.check(look.run.config["task"]["sigmas"])

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, task = Evaluation(run, upstream), run.config["task"]
        model = look.model("model", clean=task["statistics"])
        how = {"sigmas": task["sigmas"], "seed": run.config["seed"]}
        metrics: dict[str, Any] = density_ratio.density_ratio(model, look.batches(task["images"], BATCH), **how)
        metrics["mean_log_ratio"] = float(np.mean(metrics["density_ratio/log"]))
        return look.result(metrics, keep=["sigma"])
