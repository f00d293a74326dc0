"""Chapter 5: looking at the density inside a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.data.loader import mix
from gradexp.engine.build import build
from gradexp.engine.runs import Result, Run, run_id, value_of
from gradexp.evaluate import density_ratio as ratio
from gradexp.evaluate import discriminative_perturbation as perturbation
from gradexp.evaluate import gan_test as judging
from gradexp.evaluate.score_objective import objective, objective_parts
from gradexp.evaluate.spectrum import high_frequency
from gradexp.sampling import Ascent
from gradexp.tasks.look import Look, as_bytes
from gradexp.tasks.train import accuracy_on_test

BATCH = 256
SAMPLED = 64  # images that climb together
DENOISED = 64
DIFFERENTIATED = 128  # images whose Hessians are asked for together


def gan_test(run: Run) -> Result:
    """Table 5.1: `gan_test` (percent) with its interval, beside the test accuracies of the sampled model and the judge.

    `samples/high_frequency`: how noisy the samples are (evaluate.spectrum), a mean over them.
    """
    upstream, task = run.config["upstream"], run.config["task"]
    if run_id(upstream["judge"]) == run_id(upstream["model"]):
        raise UserError(
            "upstream.judge is the sampled model itself; take another one, such as the same network with upstream.judge.seed=1"
        )
    look, ascent = Look(run), build(task["sampling"], where="task.sampling")
    look.require_unit_pixels()
    model, judge = look.model("model", clean=task["statistics"]), look.model("judge")
    labels = torch.arange(task["samples"], device=look.hardware.device) % look.data.classes
    samples = sample(look, ascent, model, labels)
    metrics = judging.gan_test(judge, samples, labels, confidence=task["confidence"])
    metrics["samples/high_frequency"] = float(high_frequency(samples).nanmean())
    accuracies = {f"{name}/accuracy": value_of(look.records[name], "test/accuracy") for name in ("model", "judge")}
    if task["statistics"] is not None and not look.diverged:
        accuracies["model/accuracy"] = accuracy_on_test(model, look.data, look.hardware)  # another network than the record's
    return look.result(metrics | accuracies, keep=accuracies)


def sample(look: Look, ascent: Ascent, model: nn.Module, labels: Tensor) -> Tensor:
    """Samples of the classes `labels`."""
    shape = (look.data.channels, look.data.size, look.data.size)
    if look.diverged:
        return torch.full((len(labels), *shape), float("nan"), device=labels.device)

    def climbed(number: int, chosen: Tensor) -> Tensor:
        seeds = [mix(look.run.config["seed"], number * SAMPLED + i) for i in range(len(chosen))]
        return ascent.sample(model, chosen, seeds, shape).cpu()

    parts = torch.split(labels, SAMPLED)
    return torch.cat(look.pieces.each("samples", parts, climbed, count=len(parts))).to(labels.device)


def density_ratio(run: Run) -> Result:
    """Figure 5.1; `mean_log_ratio` is the mean of the logarithm's curve."""
    look, task = Look(run), run.config["task"]
    ratio.check(task["sigmas"])  # before the hours that the model takes
    model = look.model("model", clean=task["statistics"])
    batches = look.batches(task["images"], BATCH)
    metrics: dict[str, Any] = ratio.density_ratio(model, batches, sigmas=task["sigmas"], seed=run.config["seed"])
    metrics["mean_log_ratio"] = float(np.mean(metrics["density_ratio/log"]))
    return look.result(metrics, keep=["sigma"])


def score_objective(run: Run) -> Result:
    """The thesis's own objective (Eq. 5.2) of a model in eval mode, on test images; see evaluate.score_objective.objective."""
    look, task = Look(run), run.config["task"]
    if task["draws"] < 1 or task["sigma"] <= 0:
        raise UserError(f"task.draws={task['draws']}, task.sigma={task['sigma']}: take at least one draw, of a positive sigma")
    model = look.model("model", clean=task["statistics"])
    rows = look.rows(task["images"], DIFFERENTIATED)

    def measured(number: int, some: Tensor) -> Tensor:
        batch, how = look.batch(some), {"draws": task["draws"], "sigma": task["sigma"]}
        return objective_parts(model, batch, seed=mix(run.config["seed"], number), **how)

    parts = torch.cat(look.pieces.each("objective", rows, measured, count=len(rows)))
    found = look.result(objective(parts))
    return replace(found, facts=found.facts | {"images": len(parts)})


def roughness(look: Look, model: nn.Module, rows: Sequence[Tensor]) -> float:
    """Percentage of the energy of the label's gradient at high spatial frequencies, a mean over these test images."""
    batches = map(look.batch, rows)
    shares = [high_frequency(gradients.input_gradient(model, batch.images, batch.labels)).cpu() for batch in batches]
    return float(torch.cat(shares).nanmean())


def implicit_samples(run: Run) -> Result:
    """Figures 5.2 and 5.8: samples from noise, and images with noise that the ascent denoises.

    Metrics: the mean logit of the samples; root mean square errors of the noisy and of the denoised images; how noisy each
    of these are (evaluate.spectrum). Arrays: all samples, and the first `shown` of the others.
    """
    look, task = Look(run), run.config["task"]
    look.require_unit_pixels()
    ascent, denoising = (build(task[name], where=f"task.{name}") for name in ("sampling", "denoising"))
    model = look.model("model", clean=task["statistics"])
    labels = torch.arange(task["samples"], device=look.hardware.device) % look.data.classes
    samples = sample(look, ascent, model, labels)
    metrics = {"logit": float(gradients.scalar(model(samples), labels, "label").mean())}

    def denoised(number: int, rows: Tensor) -> tuple[Tensor, ...]:
        batch, first = look.batch(rows), len(labels) + number * DENOISED  # seeds before are those of the samples
        seeds = [mix(run.config["seed"], first + i) for i in range(len(rows))]
        return tuple(images.cpu() for images in denoising.denoise(model, batch.images, batch.labels, seeds))

    rows = look.rows(task["images"], DENOISED)
    parts = look.pieces.each("denoised", rows, denoised, count=len(rows))
    clean = torch.cat([look.batch(some).images.cpu() for some in rows])
    found = dict(zip(("noisy", "denoised"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    metrics |= {f"error/{name}": float((images - clean).square().mean().sqrt()) for name, images in found.items()}
    pictures = {"samples": samples, "images": clean, **found}
    metrics |= {f"{name}/high_frequency": float(high_frequency(images).nanmean()) for name, images in pictures.items()}
    shown = {"samples": samples, **{name: x[: task["shown"]] for name, x in {"images": clean, **found}.items()}}
    return look.result(metrics, {"labels": labels.cpu().numpy(), **{name: as_bytes(x) for name, x in shown.items()}})


def discriminative_perturbation(run: Run) -> Result:
    """Figures 5.3 and 5.6, and as arrays the gradients of Figures 5.4 and 5.7.

    `model` is perturbed, the gradients of `explainer` say where; both may be one. The gradients that are shown are those of
    the correct class, the same for all models; `gradient/high_frequency` says how noisy these are, over all images.
    """
    look, task = Look(run), run.config["task"]
    low, high = np.log10(task["fractions"]["from"]), np.log10(task["fractions"]["to"])
    how: dict[str, Any] = {
        "fractions": np.logspace(low, high, task["fractions"]["count"]).round(6).tolist(),
        "kind": task["saliency"],
        "target": task["target"],
        "replacement": task["replacement"],
    }
    perturbation.check(**how)  # before the hours that the models take
    model, explainer = (look.model(name, clean=task["statistics"]) for name in ("model", "explainer"))
    rows = look.rows(task["images"], BATCH)
    counts = look.pieces.each(
        "perturbed",
        rows,
        lambda _, some: perturbation.still_right(model, explainer, look.batch(some), seed=run.config["seed"], **how),
        count=len(rows),
    )
    metrics: dict[str, Any] = perturbation.accuracies(how["fractions"], torch.stack(counts).sum(0))
    metrics["mean_accuracy"] = float(np.mean(metrics["accuracy"]))
    metrics["gradient/high_frequency"] = roughness(look, explainer, rows)
    batch = next(look.batches(task["shown"], task["shown"]))
    gradient = gradients.input_gradient(explainer, batch.images, batch.labels)
    shown = {"images": as_bytes(batch.images), "gradients": gradient.nan_to_num(0).cpu().numpy().astype(np.float16)}
    return look.result(metrics, shown, keep=["removed"])
