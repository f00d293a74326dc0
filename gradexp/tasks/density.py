"""Chapter 5: looking at the density inside a classifier."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import mix
from gradexp.errors import UserError
from gradexp.evaluate import density_ratio as ratio
from gradexp.evaluate import discriminative_perturbation as perturbation
from gradexp.evaluate import gan_test as judging
from gradexp.runs import Result, Run, digests, run_id, value_of, write_atomically
from gradexp.sampling import Ascent
from gradexp.tasks.build import build
from gradexp.tasks.look import Look, as_bytes
from gradexp.tasks.progress import Progress

BATCH = 256
SAMPLED = 64  # images that climb together: a killed run loses what these had done


def gan_test(run: Run) -> Result:
    """Table 5.1: `gan_test` (percent) with its interval, beside the test accuracies of the sampled model and the judge."""
    upstream, task = run.config["upstream"], run.config["task"]
    if run_id(upstream["judge"]) == run_id(upstream["model"]):
        raise UserError(
            "upstream.judge is the sampled model itself; take another one, such as the same network with upstream.judge.seed=1"
        )
    look, ascent = Look(run), build(task["sampling"], where="task.sampling")
    look.require_unit_pixels()
    model, judge = look.model("model"), look.model("judge")
    labels = torch.arange(task["samples"], device=look.hardware.device) % look.data.classes
    samples = sample(look, ascent, model, labels)
    metrics = judging.gan_test(judge, samples, labels, confidence=task["confidence"])
    accuracies = {f"{name}/accuracy": value_of(look.records[name], "test/accuracy") for name in ("model", "judge")}
    return look.result(metrics | accuracies, keep=accuracies)


def sample(look: Look, ascent: Ascent, model: nn.Module, labels: Tensor) -> Tensor:
    """Samples of the classes `labels`, a batch at a time; a killed run goes on after the last finished batch."""
    shape = (look.data.channels, look.data.size, look.data.size)
    if look.diverged:
        return torch.full((len(labels), *shape), float("nan"), device=labels.device)
    look.run.folder.mkdir(parents=True, exist_ok=True)
    made_by = digests(look.run.used)["model"][:12]  # samples of other weights are none of these
    files = {start: look.run.folder / f"samples_{made_by}_{start}.pt" for start in range(0, len(labels), SAMPLED)}
    missing = [start for start, file in files.items() if not file.exists()]
    progress = Progress(f"samples {look.run.id}", len(files), "batches", done=len(files) - len(missing))
    for done, start in enumerate(missing, start=progress.first + 1):
        chosen = labels[start : start + SAMPLED]
        seeds = [mix(look.run.config["seed"], start + i) for i in range(len(chosen))]
        content = io.BytesIO()
        torch.save(ascent.sample(model, chosen, seeds, shape).cpu(), content)
        write_atomically(files[start], content.getvalue())
        progress.say(done)
    samples = torch.cat([torch.load(file, weights_only=True) for file in files.values()]).to(labels.device)
    for file in look.run.folder.glob("samples_*.pt"):
        file.unlink()
    return samples


def density_ratio(run: Run) -> Result:
    """Figure 5.1; `mean_log_ratio` is the mean of the logarithm's curve."""
    look, task = Look(run), run.config["task"]
    ratio.check(task["sigmas"])  # before the hours that the model takes
    model = look.model("model")
    batches = look.batches(task["images"], BATCH)
    metrics: dict[str, Any] = ratio.density_ratio(model, batches, sigmas=task["sigmas"], seed=run.config["seed"])
    metrics["mean_log_ratio"] = float(np.mean(metrics["density_ratio/log"]))
    return look.result(metrics, keep=["sigma"])


def implicit_samples(run: Run) -> Result:
    """Figures 5.2 and 5.8: samples from noise, and images with noise that the ascent denoises.

    Metrics: the mean logit of the samples; root mean square errors of the noisy and of the denoised images. Arrays: all
    samples, and the first `shown` of the others.
    """
    look, task = Look(run), run.config["task"]
    look.require_unit_pixels()
    ascent, denoising = (build(task[name], where=f"task.{name}") for name in ("sampling", "denoising"))
    model = look.model("model")
    labels = torch.arange(task["samples"], device=look.hardware.device) % look.data.classes
    samples = sample(look, ascent, model, labels)
    metrics = {"logit": float(gradients.scalar(model(samples), labels, "label").mean())}
    errors: dict[str, list[Tensor]] = {"noisy": [], "denoised": []}
    shown = {"samples": samples}
    begin = len(labels)  # seeds before are those of the samples
    for batch in look.batches(task["images"], BATCH):
        seeds = [mix(run.config["seed"], begin + i) for i in range(len(batch.labels))]
        begin += len(seeds)
        pair = dict(zip(errors, denoising.denoise(model, batch.images, batch.labels, seeds), strict=True))
        for name, images in pair.items():
            errors[name].append((images - batch.images).square().flatten(1).mean(1))
        if "images" not in shown:
            shown |= {name: images[: task["shown"]] for name, images in {"images": batch.images, **pair}.items()}
    metrics |= {f"error/{name}": float(torch.cat(parts).mean().sqrt()) for name, parts in errors.items()}
    return look.result(metrics, {"labels": labels.cpu().numpy(), **{name: as_bytes(x) for name, x in shown.items()}})


def discriminative_perturbation(run: Run) -> Result:
    """Figures 5.3 and 5.6, and as arrays the gradients of Figures 5.4 and 5.7.

    `model` is perturbed, the gradients of `explainer` say where; both may be one. The gradients that are shown are those of
    the correct class, the same for all models.
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
    model, explainer = look.model("model"), look.model("explainer")
    batches = look.batches(task["images"], BATCH)
    metrics: dict[str, Any] = perturbation.discriminative_perturbation(
        model, explainer, batches, seed=run.config["seed"], **how
    )
    metrics["mean_accuracy"] = float(np.mean(metrics["accuracy"]))
    batch = next(look.batches(task["shown"], task["shown"]))
    gradient = gradients.input_gradient(explainer, batch.images, batch.labels)
    shown = {"images": as_bytes(batch.images), "gradients": gradient.nan_to_num(0).cpu().numpy().astype(np.float16)}
    return look.result(metrics, shown, keep=["removed"])
