"""Pictures and the terms of FullGrad's sum over layers (Figure 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.engine.task import Result
from gradexp.saliency import FullGrad, Saliency
from gradexp.tasks.saliency_gallery import SaliencyGallery, scaled


class SaliencyLayers(SaliencyGallery):
    """The gallery with full-gradients layer by layer: also arrays `layer/NAME`, and metrics `bias/...` (bias_sizes)."""

    def check_method(self, method: Saliency) -> None:
        if not isinstance(method, FullGrad):
            raise UserError("maps of layers need full-gradients: take saliency=fullgrad or one of its variants")

    def explain(self, model: nn.Module, method: Saliency, images: Tensor) -> Result:
        assert isinstance(method, FullGrad)
        layers = method.layers(model, images)
        error = float(method.completeness_error(model, images).max())
        arrays = {"maps": scaled(torch.stack(list(layers.values())).sum(0))}
        arrays |= {f"layer/{name}": scaled(maps) for name, maps in layers.items()}
        return Result({"test/completeness_error": error, **bias_sizes(model)}, facts={"layers": list(layers)}, arrays=arrays)


def bias_sizes(model: nn.Module) -> dict[str, float | list[float]]:
    """Mean absolute biases over the channels of all layers (§3.4); a kind that the model lacks is left out.

    `bias/explicit`: bias parameters. `bias/implicit`: γ mean / sqrt(var + ε), which batch normalisations subtract.
    """
    biases = gradients.biases_of(model)
    return {f"bias/{kind}": float(values.abs().mean()) for kind, values in biases.items() if len(values)}
