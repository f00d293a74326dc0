"""Figures 5.2 and 5.8: samples from noise, and images with noise that the ascent denoises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradexp import gradients
from gradexp.base.ranges import Count
from gradexp.data.loader import mix
from gradexp.engine.evaluation import Evaluation, as_bytes
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream
from gradexp.evaluate.spectrum import high_frequency
from gradexp.sampling import Ascent
from gradexp.tasks.gan_test import SamplingTask, sample

DENOISED = 64  # images that climb together


@dataclass(kw_only=True)
class ImplicitSamples(SamplingTask):
    """Metrics: the mean logit of the samples; root mean square errors of the noisy and of the denoised images; how noisy each
    of these are (evaluate.spectrum). Arrays: all samples, and the first `shown` of the others.

    images: to denoise.
    """

    denoising: Ascent
    images: Count
    shown: Count

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look = Evaluation(run, upstream)
        model = look.model("model", clean=self.statistics)
        labels = torch.arange(self.samples, device=look.hardware.device) % look.data.classes
        samples = sample(look, self.sampling, model, labels)
        metrics = {"logit": float(gradients.scalar(model(samples), labels, "label").mean())}

        def denoised(number: int, rows: Tensor) -> tuple[Tensor, ...]:
            batch, first = look.batch(rows), len(labels) + number * DENOISED  # seeds before are those of the samples
            seeds = [mix(run.config["seed"], first + i) for i in range(len(rows))]
            return tuple(images.cpu() for images in self.denoising.denoise(model, batch.images, batch.labels, seeds))

        rows = look.rows(self.images, DENOISED)
        parts = look.pieces.each("denoised", rows, denoised, count=len(rows))
        clean = torch.cat([look.batch(some).images.cpu() for some in rows])
        found = dict(zip(("noisy", "denoised"), map(torch.cat, zip(*parts, strict=True)), strict=True))
        metrics |= {f"error/{name}": float((images - clean).square().mean().sqrt()) for name, images in found.items()}
        pictures = {"samples": samples, "images": clean, **found}
        metrics |= {f"{name}/high_frequency": float(high_frequency(images).nanmean()) for name, images in pictures.items()}
        shown = {"samples": samples, **{name: x[: self.shown] for name, x in {"images": clean, **found}.items()}}
        return look.result(metrics, {"labels": labels.cpu().numpy(), **{name: as_bytes(x) for name, x in shown.items()}})

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return float(self.samples * self.sampling.steps + self.images * self.denoising.steps)
