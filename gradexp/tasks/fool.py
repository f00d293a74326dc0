"""Figure 5.5: fine-tuning a classifier until its gradients show a mask, and where the energies then lie (§5.7.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Positive
from gradexp.data.loader import Batch
from gradexp.engine.evaluation import Evaluation, as_bytes
from gradexp.engine.run import Run
from gradexp.engine.task import Finished, Result, Upstream
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.evaluate.energy import energy_inside
from gradexp.tasks.train import Train
from gradexp.terms.fooling import corner

BATCH = 256


@dataclass(kw_only=True)
class Fool(Train):
    """Trains from `start` with the fooling term, then measures the energy inside the mask before and after (percent).

    `energy/logit`, `energy/loss`, `energy/loss@T=1000` and `energy/common`: means over test images whose gradient is not zero.
    `common`: how large the gradient that all logits share is, relative to the correct logit's; a mean over the same images.
    mask: pixels a side, at the top left.
    """

    mask: Count
    temperature: Positive
    shown: Count
    images: Count | None = None

    def check(self, run: Run) -> None:
        super().check(run)
        make_mask(self.mask, run.config["data"]["size"])
        taught = run.config["method"]["terms"].get("fooling", {"mask": self.mask})["mask"]
        if taught != self.mask:
            raise UserError(
                f"method.terms.fooling.mask={taught}, but the energy is measured in task.mask={self.mask}: set task.mask alone"
            )

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        training = super().__call__(run, upstream)
        fooled = Finished(run, {"status": training.status}, run.weights)
        look = Evaluation(run, {**upstream, "fooled": fooled})
        models = {"before": look.model("start"), "after": look.model("fooled")}
        mask = make_mask(self.mask, look.data.size)
        shown = next(look.batches(self.shown, self.shown))
        metrics: dict[str, Any] = {"energy/uniform": 100 * float(mask.mean())}
        metrics["test/accuracy/before"] = accuracy_on_test(models["before"], look.data, look.hardware.device)
        arrays: dict[str, Any] = {"images": as_bytes(shown.images), "mask": mask.numpy()}
        for name, model in models.items():
            metrics |= {f"{what}/{name}": value for what, value in self.energies(look, model, mask).items()}
            gradients_shown = maps(model, shown, self.temperature)
            arrays |= {f"{kind}_{name}": unsigned(gradient) for kind, gradient in gradients_shown.items()}
        # The network that it started from is sound even where the fine-tuning diverged.
        seen = look.result(metrics, arrays, keep=[name for name in metrics if not name.endswith("/after")])
        return Result(training.metrics | seen.metrics, training.status, training.facts, seen.arrays)

    def energies(self, look: Evaluation, model: nn.Module, mask: Tensor) -> dict[str, float]:
        """Energy of the gradients inside the mask (percent), and how large the common one is; means over test images."""
        measured: dict[str, list[Tensor]] = {}
        for batch in look.batches(self.images, BATCH):
            found = maps(model, batch, self.temperature)
            for kind, gradient in found.items():
                measured.setdefault(f"energy/{kind}", []).append(energy_inside(gradient, mask.to(gradient)))
            measured.setdefault("common", []).append(_size(found["common"]) / _size(found["logit"]))
        return {what: float(torch.cat(parts).nanmean()) for what, parts in measured.items()}


def make_mask(pixels: int, size: int) -> Tensor:
    """Where the gradients are to show: 1 inside, 0 outside. (1, 1, size, size)."""
    return corner(pixels, torch.zeros(1, 1, size, size))


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
