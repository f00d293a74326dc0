"""Pictures and their maps, kept beside the record for a figure to show."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.engine.runs import Result, Run
from gradexp.saliency import FullGrad
from gradexp.tasks.look import Look
from gradexp.tasks.saliency_score import completeness, first_images, parts

BATCH = 64


def saliency_gallery(run: Run) -> Result:
    """The first test images that the model classifies correctly, `evaluate.images` of them, and their maps.

    arrays: images (N, C, H, W) uint8, maps (N, H, W) float16, scaled to a largest absolute value of 1 each.
    """
    look, model, method = parts(run)
    images, labels = recognised(look, model, run.config["evaluate"]["images"])
    torch.manual_seed(run.config["seed"])
    maps = torch.cat([method(model, one) for one in torch.split(images, BATCH)])
    errors = {f"test/{name}": float(values.max()) for name, values in completeness(method, model, images).items()}
    arrays = {"images": look.data.pixels(images).cpu().numpy(), "maps": shown(maps)}
    facts = {**named(look, labels), **look.facts()}
    return Result({"gallery/images": len(images), **errors}, facts=facts, arrays=arrays)


def saliency_layers(run: Run) -> Result:
    """The same images, and the terms of FullGrad's sum over layers (fig. 3.1): arrays `images`, `maps`, `layer/NAME`.

    Metrics say how large the model's biases are (bias_sizes).
    """
    look, model, method = parts(run)
    if not isinstance(method, FullGrad):
        raise UserError("maps of layers are those of full-gradients; take saliency=fullgrad or one of its variants")
    images, labels = recognised(look, model, run.config["evaluate"]["images"])
    torch.manual_seed(run.config["seed"])
    layers = method.layers(model, images)
    errors = method.completeness_error(model, images)
    arrays = {"images": look.data.pixels(images).cpu().numpy(), "maps": shown(torch.stack(list(layers.values())).sum(0))}
    arrays |= {f"layer/{name}": shown(maps) for name, maps in layers.items()}
    metrics: dict[str, Any] = {
        "gallery/images": len(images),
        "test/completeness_error": float(errors.max()),
        **bias_sizes(model),
    }
    return Result(metrics, facts={**named(look, labels), "layers": list(layers), **look.facts()}, arrays=arrays)


def named(look: Look, labels: Tensor) -> dict[str, Any]:
    """What a record says of the classes of its images."""
    return {"labels": labels.tolist(), "names": look.data.class_names(labels.tolist())}


def bias_sizes(model: nn.Module) -> dict[str, float]:
    """`bias/explicit`: mean absolute value of all bias parameters; `bias/implicit`: of what the running means of batch
    normalisations subtract, γ mean / sqrt(var + ε); over the channels of all layers (§3.4). What there is none of is left out.
    """
    found = gradients.biases_of(model)
    return {f"bias/{kind}": float(values.abs().mean()) for kind, values in found.items() if len(values)}


@torch.no_grad()
def recognised(look: Look, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images whose largest logit is their label's, in the data set's order, and the labels.

    Chosen before any map is seen.
    """
    images, labels, found = [], [], 0
    for batch in first_images(look, None, BATCH)[0]:
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
