"""Dropout at one layer of a network that was built without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.gradients import find_layer
from gradexp.layers import ranks


@contextmanager
def dropout_after(model: nn.Module, where: Mapping[str, Any] | None, images: Tensor) -> Iterator[None]:
    """Inside, the output of a layer passes through dropout in train mode; parameters and names stay what they were.

    where: {layer, probability}, the layer by its name or its place (gradients.find_layer); None for no dropout. In
    front of a ReLU, which keeps the sign of a scale, this is dropout of the activation behind it.
    images (B, C, H, W): any, of the right size.
    """
    if where is None:
        yield
        return
    probability = where["probability"]
    if not 0 <= probability < 1:
        raise UserError(f"method.dropout.probability={probability}: it is at least 0 and less than 1")
    layer = model.get_submodule(find_layer(model, where["layer"], images).name)
    hook = layer.register_forward_hook(lambda module, _, output: ranks.dropout(output, probability, module.training))
    try:
        yield
    finally:
        hook.remove()
