"""Scores of a saliency method on a trained model: Figure 3.2a, Tables 3.1 and 3.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.engine.assemble import make_saliency
from gradexp.engine.build import build, score_node
from gradexp.engine.evaluation import Evaluation, EvaluationTask, PerImageTask
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Upstream
from gradexp.saliency import Saliency


class SaliencyTask(EvaluationTask):
    """A task on the maps of one saliency method for one trained model."""

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        self.check_method(make_saliency(evaluation.run.config, evaluation.data, evaluation.hardware))

    def check_method(self, method: Saliency) -> None:
        """Raises UserError for a saliency method that the task can't evaluate."""

    def parts(self, run: Run, upstream: Upstream) -> tuple[Evaluation, nn.Module, Saliency]:
        """Data and hardware, the model of the upstream run, the saliency method."""
        evaluation = Evaluation(run, upstream)
        return evaluation, evaluation.model("model"), make_saliency(run.config, evaluation.data, evaluation.hardware)


class ScoringTask(SaliencyTask, PerImageTask):
    """One that works on the first `evaluate.images` test images, `evaluate.batch_size` at a time."""

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        evaluation.run.config["evaluate"]["batch_size"]  # raises UserError where it is missing

    def rows(self, evaluation: Evaluation) -> Sequence[Tensor]:
        """The row numbers of these images, a tensor for each batch."""
        options = evaluation.run.config["evaluate"]
        return evaluation.first_rows(options["images"], options["batch_size"])


class SaliencyScore(ScoringTask):
    """Metrics: mean `test/NAME` and standard deviation `test/NAME/std` (N - 1) over test images of what `evaluate` measures.

    A model that diverged makes the run `diverged`.
    """

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        make_score(evaluation.run.config)

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation, model, method = self.parts(run, upstream)
        if evaluation.diverged:
            return evaluation.result({})
        score, black = make_score(run.config), evaluation.data.black.to(evaluation.hardware.device)

        def measure(number: int, rows: Tensor) -> tuple[int, dict[str, Tensor]]:
            batch = evaluation.batch(rows)
            seed = mix(run.config["seed"], number)
            torch.manual_seed(seed)  # for random maps and methods that add noise
            scores = score(model, method, batch, black=black, seed=seed)
            scored = len(next(iter(scores.values()), ()))  # the digit flip leaves out all but one digit
            scores |= completeness(method, model, batch.images)
            return scored, {name: values.cpu() for name, values in scores.items()}

        pieces = evaluation.pieces.each("scores", self.rows(evaluation), measure)
        images = sum(scored for scored, _ in pieces)
        if not images:
            wanted = run.config["evaluate"]["images"]
            raise UserError(f"evaluate.images={wanted}: none of these test images can be scored; take more, or other classes")
        metrics: dict[str, Any] = {}
        for name in dict.fromkeys(name for _, scores in pieces for name in scores):
            values = torch.cat([scores[name] for _, scores in pieces if name in scores]).double()
            metrics[f"test/{name}"], metrics[f"test/{name}/std"] = float(values.mean()), float(values.std())
        return Result(metrics, facts={"images": images, **evaluation.facts()})


def make_score(config: Config) -> Any:
    """The score that `evaluate` names: a callable of a model, a saliency method and a batch."""
    return build(score_node(config["evaluate"]), where="evaluate")


def completeness(method: Saliency, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """{`completeness_error`: (B,)}, relative to the output (Eq. 3.1); empty for methods without it."""
    error = getattr(method, "completeness_error", None)
    return {} if error is None else {"completeness_error": error(model, images)}
