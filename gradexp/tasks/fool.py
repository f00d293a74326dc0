"""Figure 5.5: fine-tuning a classifier until its gradients show a mask, and where the energies then lie (§5.7.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.engine.runs import Result, Run
from gradexp.evaluate.energy import energy_inside
from gradexp.tasks.look import Look, as_bytes
from gradexp.tasks.train import accuracy_on_test, load_model, train
from gradexp.terms.fooling import corner

BATCH = 256


def fool(run: Run) -> Result:
    """Trains from `start` with the fooling term, then measures the energy inside the mask before and after (percent).

    `energy/logit`, `energy/loss`, `energy/loss@T=1000` and `energy/common`: means over test images whose gradient is not zero.
    `common`: how large the gradient that all logits share is, relative to the correct logit's; a mean over the same images.
    """
    look, task = Look(run), run.config["task"]
    mask = corner(task["mask"], torch.zeros(1, 1, look.data.size, look.data.size))
    taught = run.config["method"]["terms"].get("fooling", task)["mask"]
    if taught != task["mask"]:
        raise UserError(
            f"method.terms.fooling.mask={taught}, but the energy is measured in task.mask={task['mask']}: set task.mask alone"
        )
    training = train(run)
    look.diverged = training.status == "diverged"
    shown = next(look.batches(task["shown"], task["shown"]))
    metrics: dict[str, Any] = {"energy/uniform": 100 * float(mask.mean())}
    arrays: dict[str, Any] = {"images": as_bytes(shown.images), "mask": mask.numpy()}
    start = look.model("start")
    metrics["test/accuracy/before"] = accuracy_on_test(start, look.data, look.hardware)  # as `train` measured the one after
    for name, model in (("before", start), ("after", load_model(run, look.hardware))):
        measured: dict[str, list[Tensor]] = {}
        for batch in look.batches(task["images"], BATCH):
            found = maps(model, batch, task["temperature"])
            for kind, gradient in found.items():
                measured.setdefault(f"energy/{kind}", []).append(energy_inside(gradient, mask.to(gradient)))
            measured.setdefault("common", []).append(_size(found["common"]) / _size(found["logit"]))
        metrics |= {f"{what}/{name}": float(torch.cat(parts).nanmean()) for what, parts in measured.items()}
        arrays |= {f"{kind}_{name}": unsigned(gradient) for kind, gradient in maps(model, shown, task["temperature"]).items()}
    # The network that it started from is sound even where the fine-tuning diverged.
    seen = look.result(metrics, arrays, keep=[name for name in metrics if not name.endswith("/after")])
    return Result(training.metrics | seen.metrics, training.status, training.facts, seen.arrays)


def maps(model: nn.Module, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """The three gradients of Figure 5.5: of the correct logit, of the loss, of the loss at a high temperature.

    And `common`, of the mean of all logits: the function g of §5.2, where fooling adds one to each. At a high temperature T the
    loss-gradient is the common gradient minus the logit's, over T: without a common one it is the logit's.
    """
    with torch.enable_grad():
        images = batch.images.detach().requires_grad_()
        common = gradients.gradient_of_values(model(images).mean(1), images, differentiable=False).detach()
    return {
        "logit": gradients.input_gradient(model, batch.images, batch.labels),
        "loss": gradients.loss_gradient(model, batch.images, batch.labels, temperature=1.0),
        f"loss@T={temperature:g}": gradients.loss_gradient(model, batch.images, batch.labels, temperature=temperature),
        "common": common,
    }


def _size(gradient: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,)."""
    return gradient.abs().flatten(1).sum(1)


def unsigned(gradient: Tensor) -> np.ndarray:
    """Magnitude summed over channels, its sum 1 an image. (B, C, H, W) -> (B, H, W)."""
    size = gradient.abs().sum(1)
    return (size / size.sum((1, 2), keepdim=True)).nan_to_num(0).cpu().numpy().astype(np.float32)
