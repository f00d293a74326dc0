"""Layers whose backward pass can itself be differentiated at first-order cost.

A gradient penalty differentiates an input-gradient. With stock layers that second backward runs through generic
code several times slower than an ordinary one. Here the backward of every layer is a function of its own, whose
backward in turn uses nothing but the fast first-order kernels. Counting convolutions, a step that matches
input-gradients costs

    forward 1, input-gradient 1, backward of the input-gradient 2, backward of the forward 2  =  6

against 3 for a cross-entropy step: a factor of 2.

`accelerate(model)` gives a model's layers these backward passes; values, parameters and state stay what they were.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from gradexp.layers.backward import only_inputs
from gradexp.layers.batch_norm import BatchNorm
from gradexp.layers.convolution import Convolution
from gradexp.layers.pooling import MaxPool
from gradexp.layers.softplus import Softplus
from gradexp.layers.twice import Attention, Hardsigmoid

__all__ = ["Attention", "BatchNorm", "Convolution", "Hardsigmoid", "MaxPool", "Softplus", "accelerate", "only_inputs"]

FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Convolution,
    nn.BatchNorm2d: BatchNorm,
    nn.MaxPool2d: MaxPool,
    nn.Softplus: Softplus,
    nn.Hardsigmoid: Hardsigmoid,
    nn.MultiheadAttention: Attention,
}

# Stock layers whose double backward is first-order work already.
PLAIN = (
    *(nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity),
    *(nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)


def accelerate(model: nn.Module) -> nn.Module:
    """Gives the layers of `model` fast double backward passes, in place; layers it does not know keep autograd's.

    The layers' classes change, their parameters, buffers, hooks and names do not. Layers that torch differentiates once
    (Hardsigmoid, nn.MultiheadAttention with its fused kernels) become differentiable twice; an attention that calls
    scaled_dot_product_attention itself needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the forward pass. On
    a CPU, convolutions work in the channels_last layout, whatever that of the images is. Returns `model`.
    """
    unknown: set[str] = set()
    for module in model.modules():
        kind = type(module)
        if kind in FAST:
            module.__class__ = FAST[kind]
            if isinstance(module, Convolution) and module.weight.device.type == "cpu":
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif kind.__module__.startswith("torch.nn") and not list(module.children()) and kind not in PLAIN:
            unknown.add(kind.__name__)
    if unknown:
        logging.getLogger(__name__).warning(
            "autograd's own double backward for %s: exact, but slower", ", ".join(sorted(unknown))
        )
    return model
