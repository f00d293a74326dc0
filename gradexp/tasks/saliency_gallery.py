"""Pictures and their maps, kept beside the record for a figure to show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp.engine.evaluation import Evaluation
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream
from gradexp.tasks.saliency_score import SaliencyTask, completeness

BATCH = 64


class SaliencyGallery(SaliencyTask):
    """The first test images that the model classifies correctly, `evaluate.images` of them, and their maps.

    arrays: images (N, C, H, W) uint8, maps (N, H, W) float16, scaled to a largest absolute value of 1 each.
    """

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, model, method = self.parts(run, upstream)
        images, labels = recognised(look, model, run.config["evaluate"]["images"])
        torch.manual_seed(run.config["seed"])
        maps = torch.cat([method(model, some) for some in torch.split(images, BATCH)])
        errors = {f"test/{name}": float(values.max()) for name, values in completeness(method, model, images).items()}
        arrays = {"images": look.data.pixels(images).cpu().numpy(), "maps": shown(maps)}
        facts = {**named(look, labels), **look.facts()}
        return Result({"gallery/images": len(images), **errors}, facts=facts, arrays=arrays)

    def work(self, config: Config, sizes: Sizes) -> float | None:
        return 1.0

    def shortened(self, config: Config, n: int) -> Config | None:
        return None


def named(look: Evaluation, labels: Tensor) -> dict[str, Any]:
    """What a record says of the classes of its images."""
    return {"labels": labels.tolist(), "names": look.data.class_names(labels.tolist())}


@torch.no_grad()
def recognised(look: Evaluation, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images whose largest logit is their label's, in the data set's order, and the labels.

    Chosen before any map is seen.
    """
    images, labels, found = [], [], 0
    for batch in look.first_images(None, BATCH)[0]:
        right = model(batch.images).argmax(1) == batch.labels
        images.append(batch.images[right])
        labels.append(batch.labels[right])
        found += int(right.sum())
        if found >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


def shown(maps: Tensor) -> np.ndarray:
    """(N, 1, H, W) -> (N, H, W) float16, each map divided by its largest absolute value."""
    largest = maps.abs().amax((1, 2, 3), keepdim=True)
    scaled: np.ndarray = (maps / torch.where(largest > 0, largest, 1))[:, 0].cpu().numpy().astype(np.float16)
    return scaled
