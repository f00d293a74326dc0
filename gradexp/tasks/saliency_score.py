"""Score a saliency method on a trained model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch, mix
from gradexp.engine.build import build
from gradexp.engine.runs import Result, Run
from gradexp.saliency import Saliency
from gradexp.tasks.look import Look


def saliency_score(run: Run) -> Result:
    """Mean and standard deviation over test images of what `evaluate` measures: `test/NAME` and `test/NAME/std`.

    A model that diverged gives a run that diverged.
    """
    look, model, method = parts(run)
    if look.diverged:
        return look.result({})
    evaluate = dict(run.config["evaluate"])
    limit, batch_size = evaluate.pop("images"), evaluate.pop("batch_size")
    score = build(evaluate, where="evaluate")
    black = look.data.black.to(look.hardware.device)

    def scored(number: int, batch: Batch) -> tuple[int, dict[str, Tensor]]:
        seed = mix(run.config["seed"], number)
        torch.manual_seed(seed)  # of random maps and noise
        measured = score(model, method, batch, black=black, seed=seed)
        count = len(next(iter(measured.values()), ()))  # the digit flip leaves out all but one digit
        measured |= completeness(method, model, batch.images)
        return count, {name: values.cpu() for name, values in measured.items()}

    batches, count = first_images(look, limit, batch_size)
    pieces = look.pieces.each("scores", batches, scored, count=count)
    images = sum(count for count, _ in pieces)
    metrics: dict[str, Any] = {}
    for name in dict.fromkeys(name for _, measured in pieces for name in measured):
        values = torch.cat([measured[name] for _, measured in pieces if name in measured]).double()
        metrics[f"test/{name}"], metrics[f"test/{name}/std"] = float(values.mean()), float(values.std())
    if not images:
        raise UserError("evaluate.images: none of the test images was of use; raise it")
    return Result(metrics, facts={"images": images, **look.facts()})


def parts(run: Run) -> tuple[Look, nn.Module, Saliency]:
    """Data and hardware, the upstream model, the saliency method."""
    look = Look(run)
    method: Saliency = build(run.config["saliency"], where="saliency", **units(look.data, look.hardware.device))
    return look, look.model("model"), method


def units(data: ImageData, device: torch.device | str) -> dict[str, Tensor]:
    """What a saliency method has to know of the data's normalisation; (C, 1, 1) each."""
    return {"black": data.black.to(device), "std": data.statistics[1].view(-1, 1, 1).to(device)}


def first_images(look: Look, limit: int | None, batch_size: int) -> tuple[Iterator[Batch], int]:
    """The first `limit` test images (None: all), in the data set's order, which is that of a hash: as good as random.

    -> the batches, and how many they are.
    """
    loader = look.data.test_loader(batch_size=batch_size, device=look.hardware.device)
    wanted = loader.count if limit is None else min(limit, loader.count)

    def cut(number: int, batch: Batch) -> Batch:
        left = wanted - number * batch_size
        return Batch(batch.images[:left], batch.labels[:left], batch.row[:left], batch.view[:left])

    count = -(-wanted // batch_size)
    return itertools.starmap(cut, enumerate(itertools.islice(loader, count))), count


def completeness(method: Saliency, model: nn.Module, images: Tensor, target: int | None = None) -> dict[str, Tensor]:
    """The relative error of completeness (Eq. 3.1), for methods that promise it; (B,). target: see Saliency."""
    error = getattr(method, "completeness_error", None)
    return {} if error is None else {"completeness_error": error(model, images, target)}
