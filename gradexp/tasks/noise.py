"""Table 2.2: a trained model's test accuracy under noise."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np

from gradexp.engine.runs import Result, Run
from gradexp.evaluate.noise import noise_accuracies
from gradexp.tasks.look import Look
from gradexp.tasks.train import EVALUATION_BATCH


def noise(run: Run) -> Result:
    """`test/accuracy@noise=SIGMA` (percent), the mean over draws; with `/std`, their standard deviation (of the sample).

    A model that diverged gives a run that diverged.
    """
    task = run.config["task"]
    look = Look(run)
    model = look.model("model")
    batches = look.data.test_loader(batch_size=EVALUATION_BATCH, device=look.hardware.device)
    common = {"seed": run.config["seed"], "classes": look.data.classes, "device": look.hardware.device}
    metrics: dict[str, Any] = {}

    def measured(_: int, sigma: float) -> list[float]:
        draws = task["draws"] if sigma else 1
        return [nan] * draws if look.diverged else noise_accuracies(model, batches, sigma=sigma, draws=draws, **common)

    found = look.pieces.each("noise", task["sigmas"], measured, count=len(task["sigmas"]))
    for sigma, values in zip(task["sigmas"], found, strict=True):
        metrics[f"test/accuracy@noise={sigma:g}"] = round(float(np.mean(values)), 4)
        if len(values) > 1:
            metrics[f"test/accuracy@noise={sigma:g}/std"] = round(float(np.std(values, ddof=1)), 4)
    return look.result(metrics)
