"""Figure 5.5: a classifier fine-tuned until its gradients show a mask, and the energy of its gradients there (§5.7.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, Positive
from gradexp.data.loader import Batch
from gradexp.engine.evaluation import Evaluation, as_bytes
from gradexp.engine.record import Record
from gradexp.engine.run import Run
from gradexp.engine.task import Finished, Result, Upstream
from gradexp.evaluate.accuracy import accuracy_on_test
from gradexp.evaluate.energy import energy_inside
from gradexp.tasks.train import Train
from gradexp.terms.fooling import corner, unsigned_saliency

BATCH = 256


@dataclass(kw_only=True)
class Fool(Train):
    """Trains from the upstream run `start` with the fooling term, and measures the energy inside the mask before and after.

    Metrics, each with `/before` and `/after`: `energy/KIND` for the gradients of `maps`, percent, a mean over the test images
    whose gradient is not zero; `common`, the L1 norm of the gradient of the mean logit divided by that of the label's logit.
    Further: those of Train, `energy/uniform` and `test/accuracy/before`. Arrays: `shown` images, the mask and maps.
    mask: side of the square at the top left, in pixels. temperature: T of the loss. images: test images, None for all.
    """

    mask: Count
    temperature: Positive
    shown: Count
    images: Count | None = None

    def check(self, run: Run) -> None:
        super().check(run)
        corner(self.mask, [run.config["data"]["size"]] * 2)
        trained = run.config["method"]["terms"].get("fooling", {"mask": self.mask})["mask"]
        if trained != self.mask:
            raise UserError(
                f"method.terms.fooling.mask={trained}, but the energy is measured in task.mask={self.mask}: set task.mask alone"
            )

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        training = super().__call__(run, upstream)
        fooled = Finished(run, cast(Record, {"status": training.status}), run.weights)
        evaluation = Evaluation(run, {**upstream, "fooled": fooled})
        models = {"before": evaluation.model("start"), "after": evaluation.model("fooled")}
        mask = corner(self.mask, [evaluation.data.size] * 2)
        shown = next(evaluation.batches(self.shown, self.shown))
        metrics: dict[str, Any] = {"energy/uniform": 100 * float(mask.mean())}
        metrics["test/accuracy/before"] = accuracy_on_test(models["before"], evaluation.data, evaluation.hardware.device)
        arrays: dict[str, Any] = {"images": as_bytes(shown.images), "mask": mask.numpy()}
        for name, model in models.items():
            metrics |= {f"{what}/{name}": value for what, value in self.energies(evaluation, model, mask).items()}
            arrays |= {f"{kind}_{name}": drawn(gradient) for kind, gradient in maps(model, shown, self.temperature).items()}
        before = [name for name in metrics if not name.endswith("/after")]  # valid even if the fine-tuning diverged
        measured = evaluation.result(metrics, arrays, keep=before)
        return Result(training.metrics | measured.metrics, training.status, training.facts, measured.arrays)

    def energies(self, evaluation: Evaluation, model: nn.Module, mask: Tensor) -> dict[str, float]:
        """Energy of the gradients inside the mask, in percent, and relative size of the common one; means over test images."""
        values: dict[str, list[Tensor]] = {}
        for batch in evaluation.batches(self.images, BATCH):
            gradient_maps = maps(model, batch, self.temperature)
            for kind, gradient in gradient_maps.items():
                values.setdefault(f"energy/{kind}", []).append(energy_inside(gradient, mask.to(gradient)))
            values.setdefault("common", []).append(_l1(gradient_maps["common"]) / _l1(gradient_maps["logit"]))
        return {name: float(torch.cat(parts).nanmean()) for name, parts in values.items()}


def maps(model: nn.Module, batch: Batch, temperature: float) -> dict[str, Tensor]:
    """Gradients {kind: (B, C, H, W)} in eval mode: of the label's logit, of the loss (Eq. 5.6), of the loss at `temperature`.

    These three are those of Figure 5.5. `common` is the gradient of the mean logit, which is ∇g where fooling added g to all
    logits (§5.2). At a high temperature T the loss-gradient tends to (common - logit) / T.
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


def _l1(gradient: Tensor) -> Tensor:
    """L1 norm: (B, C, H, W) -> (B,)."""
    return gradient.abs().flatten(1).sum(1)


def drawn(gradient: Tensor) -> np.ndarray:
    """The unsigned saliency as an array; NaN becomes 0: (B, C, H, W) -> (B, H, W)."""
    return unsigned_saliency(gradient).nan_to_num(0).cpu().numpy().astype(np.float32)
