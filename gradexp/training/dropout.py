"""Dropout at one layer of a network that was built without it (§4.3, Table 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from gradexp.base.errors import UserError
from gradexp.base.ranges import Probability, require
from gradexp.gradients import find_layer
from gradexp.gradients.capture import module_of
from gradexp.layers import ranks


@contextmanager
def dropout_after(model: nn.Module, where: Mapping[str, Any] | None, images: Tensor) -> Iterator[None]:
    """A context in which the output of one layer passes through dropout in train mode; parameters and names do not change.

    Before a ReLU this equals dropout of the activation behind it, since relu(k z) = k relu(z) for k >= 0.
    where: {layer, probability}, the layer as a module's name or a rule (gradients.find_layer); None for no dropout.
    images (B, C, H, W): any of the right size. Raises UserError for a probability outside [0, 1) or an unknown layer.
    """
    if where is None:
        yield
        return
    probability = where["probability"]
    require(Probability, **{"method.dropout.probability": probability})
    name = find_layer(model, where["layer"], images).name
    if module_of(name) != name:
        raise UserError(
            f"method.dropout.layer={where['layer']}: {module_of(name)} is called several times; choose another layer"
        )
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda module, _, output: ranks.dropout(output, probability, module.training))
    try:
        yield
    finally:
        hook.remove()
