"""Table 5.1: GAN-test of samples from the implicit density of a classifier (§5.5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count
from gradexp.data.loader import mix
from gradexp.engine.evaluation import Evaluation, EvaluationTask, Statistics
from gradexp.engine.record import value_of
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream
from gradexp.evaluate import gan_test
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.evaluate.spectrum import high_frequency
from gradexp.sampling import Ascent

SAMPLED = 64  # images per batch of the ascent


@dataclass(kw_only=True)
class SamplingTask(EvaluationTask):
    """A task that draws `samples` samples from the implicit density of a trained model; pixels are in [0, 1]."""

    sampling: Ascent
    samples: Count
    statistics: Statistics = None

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        if evaluation.data.normalise != "none":
            raise UserError(
                f"data.normalise={evaluation.data.normalise}: sampling clips pixels to [0, 1]; use data.normalise=none"
            )
        if self.sampling.start is None:
            raise UserError("task.sampling.start is null: set the mean and standard deviation of where samples start")

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return float(self.samples * self.sampling.steps)


@dataclass(kw_only=True)
class GANTest(SamplingTask):
    """Accuracy of the upstream run `judge` on samples of the upstream run `model`, whose labels cycle over the classes.

    Metrics, in percent: `gan_test`, `gan_test/low` and `gan_test/high` (evaluate.gan_test); `model/accuracy` and
    `judge/accuracy` on test images; `samples/high_frequency` (evaluate.spectrum), a mean over samples.
    confidence: of the interval. statistics: see Evaluation.model, `clean`.
    """

    confidence: Annotated[float, Gt(0), Lt(1)]

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        if evaluation.run.upstream["judge"].id == evaluation.run.upstream["model"].id:
            raise UserError(
                "upstream.judge is the sampled model itself: take another network, "
                "such as the same one with another seed (upstream.judge.seed=1)"
            )

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model, judge = evaluation.model("model", clean=self.statistics), evaluation.model("judge")
        labels = torch.arange(self.samples, device=evaluation.hardware.device) % evaluation.data.classes
        samples = sample(evaluation, self.sampling, model, labels)
        metrics = gan_test.gan_test(judge, samples, labels, confidence=self.confidence)
        metrics["samples/high_frequency"] = float(high_frequency(samples).nanmean())
        accuracies = {f"{name}/accuracy": value_of(upstream[name].record, "test/accuracy") for name in ("model", "judge")}
        if self.statistics is not None and not evaluation.diverged:  # no longer the network of the record
            accuracies["model/accuracy"] = accuracy_on_test(model, evaluation.data, evaluation.hardware.device)
        return evaluation.result(metrics | accuracies, keep=accuracies)


def sample(evaluation: Evaluation, ascent: Ascent, model: nn.Module, labels: Tensor) -> Tensor:
    """Samples of the classes `labels`, all NaN for a model that diverged: (B,) -> (B, C, H, W)."""
    shape = (evaluation.data.channels, evaluation.data.size, evaluation.data.size)
    if evaluation.diverged:
        return torch.full((len(labels), *shape), float("nan"), device=labels.device)

    def climb(number: int, classes: Tensor) -> Tensor:
        seeds = [mix(evaluation.run.config["seed"], number * SAMPLED + i) for i in range(len(classes))]
        return ascent.sample(model, classes, seeds, shape).cpu()

    parts = torch.split(labels, SAMPLED)
    return torch.cat(evaluation.pieces.each("samples", parts, climb)).to(labels.device)
