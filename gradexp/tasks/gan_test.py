"""Table 5.1: what another network sees in samples of a classifier's density (§5.5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

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

SAMPLED = 64  # images that climb together


@dataclass(kw_only=True)
class SamplingTask(EvaluationTask):
    """A task that samples the density of a trained model; pixels are in [0, 1]."""

    unit_pixels: ClassVar[bool] = True

    sampling: Ascent
    samples: Count
    statistics: Statistics = None

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return float(self.samples * self.sampling.steps)

    def shortened(self, config: Config, n: int) -> Config | None:
        task = config["task"]
        cut = {name: task[name] | {"steps": n} for name in ("sampling", "denoising") if name in task}
        few = {name: min(task[name], SAMPLED) for name in ("samples", "images") if name in task}
        return config | {"task": task | cut | few}


@dataclass(kw_only=True)
class GANTest(SamplingTask):
    """`gan_test` (percent) with its interval, beside the test accuracies of the sampled model and the judge.

    `samples/high_frequency`: how noisy the samples are (evaluate.spectrum), a mean over them.
    """

    confidence: Annotated[float, Gt(0), Lt(1)]

    def check_setup(self, look: Evaluation) -> None:
        super().check_setup(look)
        if look.run.upstream["judge"].id == look.run.upstream["model"].id:
            raise UserError(
                "upstream.judge is the sampled model itself; take another one, "
                "such as the same network with another seed (upstream.judge.seed=1)"
            )

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look = Evaluation(run, upstream)
        model, judge = look.model("model", clean=self.statistics), look.model("judge")
        labels = torch.arange(self.samples, device=look.hardware.device) % look.data.classes
        samples = sample(look, self.sampling, model, labels)
        metrics = gan_test.gan_test(judge, samples, labels, confidence=self.confidence)
        metrics["samples/high_frequency"] = float(high_frequency(samples).nanmean())
        accuracies = {f"{name}/accuracy": value_of(upstream[name].record, "test/accuracy") for name in ("model", "judge")}
        if self.statistics is not None and not look.diverged:  # another network than the record's
            accuracies["model/accuracy"] = accuracy_on_test(model, look.data, look.hardware.device)
        return look.result(metrics | accuracies, keep=accuracies)


def sample(look: Evaluation, ascent: Ascent, model: nn.Module, labels: Tensor) -> Tensor:
    """Samples of the classes `labels`; NaN where the model diverged. (B,) -> (B, C, H, W)."""
    shape = (look.data.channels, look.data.size, look.data.size)
    if look.diverged:
        return torch.full((len(labels), *shape), float("nan"), device=labels.device)

    def climbed(number: int, chosen: Tensor) -> Tensor:
        seeds = [mix(look.run.config["seed"], number * SAMPLED + i) for i in range(len(chosen))]
        return ascent.sample(model, chosen, seeds, shape).cpu()

    parts = torch.split(labels, SAMPLED)
    return torch.cat(look.pieces.each("samples", parts, climbed, count=len(parts))).to(labels.device)
