"""Pictures and their saliency maps, as arrays for figures (Figures 3.3 and 3.4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from gradexp.engine.evaluation import Evaluation
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.saliency import Saliency
from gradexp.tasks.saliency_score import SaliencyTask, completeness

BATCH = 64


class SaliencyGallery(SaliencyTask):
    """The first `evaluate.images` test images that the model classifies correctly, and their maps.

    Arrays: `images` (N, C, H, W) uint8; `maps` (N, H, W) float16, each divided by its largest absolute value.
    Metrics: `gallery/images`, their number; `test/completeness_error`, the largest, for methods that are complete.
    """

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation, model, method = self.parts(run, upstream)
        images, labels = recognised(evaluation, model, run.config["evaluate"]["images"])
        torch.manual_seed(run.config["seed"])
        explained = self.explain(model, method, images)
        names = {"labels": labels.tolist(), "names": evaluation.data.class_names(labels.tolist())}
        return Result(
            {"gallery/images": len(images), **explained.metrics},
            facts={**names, **explained.facts, **evaluation.facts()},
            arrays={"images": evaluation.data.pixels(images).cpu().numpy(), **explained.arrays},
        )

    def explain(self, model: nn.Module, method: Saliency, images: Tensor) -> Result:
        """The maps of the images, and what the record holds of them."""
        maps = torch.cat([method(model, part) for part in torch.split(images, BATCH)])
        errors = {f"test/{name}": float(values.max()) for name, values in completeness(method, model, images).items()}
        return Result({**errors}, arrays={"maps": scaled(maps)})


@torch.no_grad()
def recognised(evaluation: Evaluation, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images, in the data set's order, whose largest logit is their label's; and the labels."""
    images, labels, chosen = [], [], 0
    for batch in map(evaluation.batch, evaluation.first_rows(None, BATCH)):
        correct = model(batch.images).argmax(1) == batch.labels
        images.append(batch.images[correct])
        labels.append(batch.labels[correct])
        chosen += int(correct.sum())
        if chosen >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def scaled(maps: Tensor) -> np.ndarray:
    """Maps (N, 1, H, W), each divided by its largest absolute value: (N, H, W) float16."""
    largest = maps.abs().amax((1, 2, 3), keepdim=True)
    values: np.ndarray = (maps / torch.where(largest > 0, largest, 1))[:, 0].cpu().numpy().astype(np.float16)
    return values
