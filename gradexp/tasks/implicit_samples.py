"""Figures 5.2 and 5.8: samples from the implicit density, and noisy images denoised by the same ascent (§5.5.1, §5.10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Count
from gradexp.data.loader import mix
from gradexp.engine.evaluation import Evaluation, as_bytes
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream
from gradexp.evaluate.spectrum import high_frequency
from gradexp.sampling import Ascent
from gradexp.tasks.gan_test import SamplingTask, sample

DENOISED = 64  # images per batch of the ascent


@dataclass(kw_only=True)
class ImplicitSamples(SamplingTask):
    """Metrics: `logit`, mean logit of the samples; `error/noisy` and `error/denoised`, root mean square error per pixel;
    `PICTURES/high_frequency` (evaluate.spectrum), percent. Arrays: all samples with labels, the first `shown` of the others.

    images: number of test images to denoise. statistics: see Evaluation.model, `clean`.
    """

    denoising: Ascent
    images: Count
    shown: Count

    def check_setup(self, evaluation: Evaluation) -> None:
        super().check_setup(evaluation)
        if self.denoising.noise is None:
            raise UserError("task.denoising.noise is null: set the standard deviation of the noise that is added to images")

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation = Evaluation(run, upstream)
        model = evaluation.model("model", clean=self.statistics)
        labels = torch.arange(self.samples, device=evaluation.hardware.device) % evaluation.data.classes
        samples = sample(evaluation, self.sampling, model, labels)
        metrics = {"logit": float(gradients.scalar(model(samples), labels, "label").mean())}

        def denoise(number: int, rows: Tensor) -> tuple[Tensor, ...]:
            batch, first = evaluation.batch(rows), len(labels) + number * DENOISED  # the seeds before are those of the samples
            seeds = [mix(run.config["seed"], first + i) for i in range(len(rows))]
            return tuple(images.cpu() for images in self.denoising.denoise(model, batch.images, batch.labels, seeds))

        rows = evaluation.rows(self.images, DENOISED)
        parts = evaluation.pieces.each("denoised", rows, denoise)
        noisy, denoised = map(torch.cat, zip(*parts, strict=True))
        clean = torch.cat([evaluation.batch(part).images.cpu() for part in rows])
        for name, images in {"noisy": noisy, "denoised": denoised}.items():
            metrics[f"error/{name}"] = float((images - clean).square().mean().sqrt())
        pictures = {"samples": samples, "images": clean, "noisy": noisy, "denoised": denoised}
        metrics |= {f"{name}/high_frequency": float(high_frequency(images).nanmean()) for name, images in pictures.items()}
        shown = {name: as_bytes(x if name == "samples" else x[: self.shown]) for name, x in pictures.items()}
        return evaluation.result(metrics, {"labels": labels.cpu().numpy(), **shown})

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return float(self.samples * self.sampling.steps + self.images * self.denoising.steps)
