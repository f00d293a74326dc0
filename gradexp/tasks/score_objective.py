"""The score-matching objective (Eq. 5.2) of a trained model on test images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradexp.base.ranges import Count, Positive
from gradexp.data.loader import mix
from gradexp.engine.evaluation import Evaluation, PerImageTask, Statistics
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.score_objective import objective, objective_parts

BATCH = 128  # images per batch


@dataclass(kw_only=True)
class ScoreObjective(PerImageTask):
    """Metrics: E[h] + ½ E‖∇f‖² in eval mode, and its parts (evaluate.score_objective.objective).

    draws: directions per image for the trace. sigma: standard deviation of the noise in Eq. 5.9. images: test images, None for
    all. statistics: see Evaluation.model, `clean`.
    """

    draws: Count
    sigma: Positive
    images: Count | None = None
    statistics: Statistics = None

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model = evaluation.model("model", clean=self.statistics)
        rows = evaluation.rows(self.images, BATCH)

        def measure(number: int, rows: Tensor) -> Tensor:
            seed = mix(run.config["seed"], number)
            return objective_parts(model, evaluation.batch(rows), seed=seed, draws=self.draws, sigma=self.sigma)

        parts = torch.cat(evaluation.pieces.each("objective", rows, measure))
        result = evaluation.result(objective(parts))
        return replace(result, facts=result.facts | {"images": len(parts)})
