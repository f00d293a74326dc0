"""Figure 5.5: fine-tuning a classifier until its gradients show a mask, and where the energies then lie (§5.7.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch
from gradexp.errors import UserError
from gradexp.evaluate.energy import energy_inside
from gradexp.runs import Result, Run
from gradexp.tasks.look import Look, as_bytes
from gradexp.tasks.train import accuracy_on_test, load_model, train
from gradexp.terms.fooling import corner

BATCH = 256


def fool(run: Run) -> Result:
    """Trains from `start` with the fooling term, then measures the energy inside the mask before and after (percent).

    `energy/logit`, `energy/loss`, and `energy/loss@T=1000`: means over test images whose gradient is not zero.
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
        energies: dict[str, list[Tensor]] = {}
        for batch in look.batches(task["images"], BATCH):
            for kind, gradient in maps(model, batch, task["temperature"]).items():
                energies.setdefault(kind, []).append(energy_inside(gradient, mask.to(gradient)))
        metrics |= {f"energy/{kind}/{name}": float(torch.cat(parts).nanmean()) for kind, parts in energies.items()}
        arrays |= {f"{kind}_{name}": unsigned(gradient) for kind, gradient in maps(model, shown, task["temperature"]).items()}
    # The network that it started from is sound even where the fine-tuning diverged.
    measured = look.result(metrics, arrays, keep=[name for name in metrics if not name.endswith("/after")])
    return Result(training.metrics | measured.metrics, training.status, training.facts, measured.arrays)


def maps(model: nn.Module, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """The three gradients of Figure 5.5: of the correct logit, of the loss, of the loss at a high temperature."""
    return {
        "logit": gradients.input_gradient(model, batch.images, batch.labels),
        "loss": gradients.loss_gradient(model, batch.images, batch.labels, temperature=1.0),
        f"loss@T={temperature:g}": gradients.loss_gradient(model, batch.images, batch.labels, temperature=temperature),
    }


def unsigned(gradient: Tensor) -> np.ndarray:
    """Magnitude summed over channels, its sum 1 an image. (B, C, H, W) -> (B, H, W)."""
    size = gradient.abs().sum(1)
    return (size / size.sum((1, 2), keepdim=True)).nan_to_num(0).cpu().numpy().astype(np.float32)
