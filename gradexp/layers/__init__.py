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
from types import FunctionType

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from gradexp.base.errors import UserError
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
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Hardtanh, nn.Hardswish, nn.SiLU, nn.GELU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.LogSigmoid, nn.Softmax, nn.LogSoftmax, nn.Linear, nn.LayerNorm, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ZeroPad2d),
)


def accelerate(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Gives the layers of `model` fast double backward passes, in place; layers it does not know keep autograd's.

    The layers' classes change, their parameters, buffers, hooks and names do not. Layers that torch differentiates once
    (Hardsigmoid, nn.MultiheadAttention with its fused kernels) become differentiable twice; an attention that calls
    scaled_dot_product_attention itself needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the forward pass.
    channels_last: on a CPU, convolutions work in this layout, whatever that of the images is, as it is the faster one; their
    outputs, weights and gradients of weights have it, too, so that `view` may refuse them where `reshape` does not. Returns
    `model`. A warning names the layers that stay as they are, subclasses of torch's among them, and those that call
    scaled_dot_product_attention.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate takes a network (nn.Module), got {type(model).__name__}")
    unknown, attending = set[str](), set[str]()
    for module in model.modules():
        kind = type(module)
        if kind in FAST and "weight" not in vars(module):  # there, a weight is computed from parameters: weight_norm, pruning
            module.__class__ = FAST[kind]
        if type(module) is Convolution:
            changes = channels_last or kind is Convolution  # a stock network's weights keep their layout otherwise
            module.channels_last = channels_last
            if changes and module.weight.device.type == "cpu":
                layout = torch.channels_last if channels_last else torch.contiguous_format
                module.weight.data = module.weight.data.contiguous(memory_format=layout)
        elif _is_left_slow(module):
            unknown.add(kind.__name__)
        if _calls_fused_attention(kind):
            attending.add(kind.__name__)
    logger = logging.getLogger(__name__)
    if unknown:
        logger.warning("autograd's own double backward for %s: exact, but slower", ", ".join(sorted(unknown)))
    if attending:
        logger.warning(
            "%s calls scaled_dot_product_attention, which torch differentiates once: put the forward pass of a penalty inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
            ", ".join(sorted(attending)),
        )
    return model


def _is_left_slow(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__module__.startswith("gradexp.layers"):
        return False
    return isinstance(module, tuple(FAST)) or (
        kind.__module__.startswith("torch.nn") and not list(module.children()) and kind not in PLAIN
    )


def _calls_fused_attention(kind: type[nn.Module]) -> bool:
    own = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.nn", "gradexp.layers"))]
    functions = [each for base in own for each in vars(base).values() if isinstance(each, FunctionType)]
    return any(scaled_dot_product_attention.__name__ in function.__code__.co_names for function in functions)
