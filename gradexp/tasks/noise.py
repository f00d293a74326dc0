"""Table 2.2: a trained model's test accuracy under noise."""

from __future__ import annotations

from math import nan
from typing import Any

import numpy as np

from gradexp.evaluate.noise import noise_accuracies
from gradexp.runs import Result, Run
from gradexp.tasks.build import build
from gradexp.tasks.hardware import Hardware
from gradexp.tasks.train import EVALUATION_BATCH, load_model, make_data


def noise(run: Run) -> Result:
    """`test/accuracy@noise=SIGMA` (percent), the mean over draws; with `/std`, their standard deviation (of the sample).

    A model that diverged gives a run that diverged.
    """
    task = run.config["task"]
    hardware: Hardware = build(run.config["trainer"], where="trainer")
    hardware.apply()
    data = make_data(run.config, run.paths)
    upstream = run.upstream("model")
    diverged = (upstream.record() or {}).get("status") == "diverged"
    model = load_model(upstream, hardware)
    batches = data.test_loader(batch_size=EVALUATION_BATCH, device=hardware.device)
    common = {"seed": run.config["seed"], "classes": data.classes, "device": hardware.device}
    metrics: dict[str, Any] = {}
    for sigma in task["sigmas"]:
        draws = task["draws"] if sigma else 1
        values = [nan] * draws if diverged else noise_accuracies(model, batches, sigma=sigma, draws=draws, **common)
        metrics[f"test/accuracy@noise={sigma:g}"] = round(float(np.mean(values)), 4)
        if draws > 1:
            metrics[f"test/accuracy@noise={sigma:g}/std"] = round(float(np.std(values, ddof=1)), 4)
    facts = {"data": data.fingerprint(), **hardware.facts(mixed=False)}
    return Result(metrics, status="diverged" if diverged else "finished", facts=facts)
