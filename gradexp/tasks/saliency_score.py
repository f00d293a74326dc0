"""Score a saliency method on a trained model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch, mix
from gradexp.errors import UserError
from gradexp.runs import Result, Run
from gradexp.saliency import Saliency
from gradexp.tasks.build import build
from gradexp.tasks.hardware import Hardware
from gradexp.tasks.train import load_model, make_data


def saliency_score(run: Run) -> Result:
    """Mean and standard deviation over test images of what `evaluate` measures: `test/NAME` and `test/NAME/std`."""
    hardware, model, data, method = parts(run)
    evaluate = dict(run.config["evaluate"])
    limit, batch_size = evaluate.pop("images"), evaluate.pop("batch_size")
    score = build(evaluate, where="evaluate")
    black = data.black.to(hardware.device)
    found: dict[str, list[Tensor]] = {}
    images = 0  # scored: the digit flip leaves out all but one digit
    for number, batch in enumerate(first_images(data, limit, batch_size, hardware)):
        seed = mix(run.config["seed"], number)
        torch.manual_seed(seed)  # of random maps and noise
        measured = score(model, method, batch, black=black, seed=seed)
        images += len(next(iter(measured.values()), ()))
        for name, values in {**measured, **completeness(method, model, batch.images)}.items():
            found.setdefault(name, []).append(values.cpu())
    metrics: dict[str, Any] = {}
    for name, values in ((name, torch.cat(pieces).double()) for name, pieces in found.items()):
        metrics[f"test/{name}"], metrics[f"test/{name}/std"] = float(values.mean()), float(values.std())
    if not images:
        raise UserError("evaluate.images: none of the test images was of use; raise it")
    return Result(metrics, facts={"data": data.fingerprint(), "images": images, **hardware.facts(mixed=False)})


def parts(run: Run) -> tuple[Hardware, nn.Module, ImageData, Saliency]:
    """Hardware, the upstream model, the data, the saliency method."""
    hardware: Hardware = build(run.config["trainer"], where="trainer")
    hardware.apply()
    data = make_data(run.config, run.paths)
    model = load_model(run.upstream("model"), hardware)
    method: Saliency = build(run.config["saliency"], where="saliency", black=data.black.to(hardware.device))
    return hardware, model, data, method


def first_images(data: ImageData, limit: int | None, batch_size: int, hardware: Hardware) -> Iterator[Batch]:
    """The first `limit` test images (None: all), in the data set's order, which is that of a hash: as good as random."""
    loader = data.test_loader(batch_size=batch_size, device=hardware.device)
    left = len(loader) * batch_size if limit is None else limit
    for batch in itertools.islice(loader, -(-left // batch_size)):
        yield Batch(batch.images[:left], batch.labels[:left], batch.row[:left], batch.view[:left])
        left -= len(batch.images)


def completeness(method: Saliency, model: nn.Module, images: Tensor, target: int | None = None) -> dict[str, Tensor]:
    """The relative error of completeness (Eq. 3.1), for methods that promise it; (B,). target: see Saliency."""
    error = getattr(method, "completeness_error", None)
    return {} if error is None else {"completeness_error": error(model, images, target)}
