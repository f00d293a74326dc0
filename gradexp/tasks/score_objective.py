"""The thesis's own objective (Eq. 5.2) of a trained model, on test images."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.engine.evaluation import Evaluation, PerImageTask
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.evaluate.score_objective import objective, objective_parts

BATCH = 128  # images whose Hessians are asked for together


class ScoreObjective(PerImageTask):
    """E[h] + ½ E‖∇f‖² in eval mode, and its parts (evaluate.score_objective.objective)."""

    def check_setup(self, look: Evaluation) -> None:
        super().check_setup(look)
        task = look.run.config["task"]
        if task["draws"] < 1 or task["sigma"] <= 0:
            raise UserError(f"task.draws={task['draws']}, task.sigma={task['sigma']}: draws must be at least 1, sigma positive")

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, task = Evaluation(run, upstream), run.config["task"]
        model = look.model("model", clean=task["statistics"])
        rows = look.rows(task["images"], BATCH)

        def measured(number: int, some: Tensor) -> Tensor:
            batch, how = look.batch(some), {"draws": task["draws"], "sigma": task["sigma"]}
            return objective_parts(model, batch, seed=mix(run.config["seed"], number), **how)

        parts = torch.cat(look.pieces.each("objective", rows, measured, count=len(rows)))
        found = look.result(objective(parts))
        return replace(found, facts=found.facts | {"images": len(parts)})
