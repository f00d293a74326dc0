"""What the backward passes of all layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import wrap_torch_function

_only_inputs = False


@contextmanager
def only_inputs() -> Iterator[None]:
    """Inside, backward passes skip the gradients of parameters: they are on no path to the input.

    Autograd knows this of its own nodes, but does not tell it to a Function. Not reentrant across threads.
    """
    global _only_inputs
    before, _only_inputs = _only_inputs, True
    try:
        yield
    finally:
        _only_inputs = before


def visible(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function as one operation for torch-function modes, which do not see a Function (gradexp.gradients.operations)."""
    return wrap_torch_function(lambda *tensors: tensors)(function)


def left_to_torch(x: Tensor) -> bool:
    """Whether torch's own layer is to do it: for a single map (C, H, W), and while torch.compile traces the network, which
    would lose the derivatives of a Function's backward pass without a word."""
    return x.ndim != 4 or torch.compiler.is_compiling()


def computed(*parameters: Tensor | None) -> bool:
    """Whether one of these is computed by something else, maybe from the images: `only_inputs` would lose its gradient."""
    return not all(parameter is None or parameter.is_leaf for parameter in parameters)


def wants_parameters() -> bool:
    """Whether a backward pass is to compute the gradients of parameters too."""
    return not _only_inputs


def aligned(g: Tensor, x: Tensor) -> Tensor:
    """g in the memory layout of x. Global pooling hands down gradients in another one, and kernels are slow on a mix."""
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return g.contiguous(memory_format=layout)
