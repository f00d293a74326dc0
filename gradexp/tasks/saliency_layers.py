"""Pictures and the terms of FullGrad's sum over layers (figure 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.engine.run import Run
from gradexp.engine.task import Result, Upstream
from gradexp.saliency import FullGrad, Saliency
from gradexp.tasks.saliency_gallery import SaliencyGallery, named, recognised, shown


class SaliencyLayers(SaliencyGallery):
    """The gallery's images, and the map of each layer: arrays `images`, `maps`, `layer/NAME`.

    Metrics say how large the model's biases are (bias_sizes).
    """

    def check_method(self, method: Saliency) -> None:
        if not isinstance(method, FullGrad):
            raise UserError("maps of layers are those of full-gradients; take saliency=fullgrad or one of its variants")

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, model, method = self.parts(run, upstream)
        assert isinstance(method, FullGrad)
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


def bias_sizes(model: nn.Module) -> dict[str, float]:
    """`bias/explicit`: mean absolute value of all bias parameters; `bias/implicit`: of what the running means of batch
    normalisations subtract, γ mean / sqrt(var + ε); over the channels of all layers (§3.4). What there is none of is left out.
    """
    found = gradients.biases_of(model)
    return {f"bias/{kind}": float(values.abs().mean()) for kind, values in found.items() if len(values)}
