"""Networks of torchvision, with weights from a file."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from gradexp.base.errors import UserError, nearest


def torchvision_model(*, name: str, architecture: str, classes: int) -> nn.Module:
    """A torchvision classifier without weights; its ReLUs are not in-place, so that captured activations keep their meaning."""
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise UserError(f"model.architecture={architecture}: torchvision has no such classifier{nearest(architecture, known)}")
    model: nn.Module = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return model


def published_file(architecture: str) -> tuple[str, str]:
    """(file name, address) of the weights that torchvision published first, those of the papers."""
    published = next(iter(torchvision.models.get_model_weights(architecture)))
    return published.url.rpartition("/")[2], published.url


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a state dict. Raises UserError for a file that is damaged or of another architecture."""
    try:
        weights = torch.load(file, weights_only=True, map_location="cpu")
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, AttributeError, ...
        raise UserError(f"{file} holds no weights that can be read ({str(error).splitlines()[0]}); fetch it again") from None
    # Files from before 2017 do not count batches.
    mine = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name in mine if shapes.get(name) != mine[name] and not name.endswith("num_batches_tracked")]
    wrong += [name for name in shapes if name not in mine]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{file} is of another architecture: {first} is {shapes.get(first, 'not there')}, the model's is "
            f"{mine.get(first, 'not there')} ({len(wrong)} such); place the right file, or choose its model"
        )
    model.load_state_dict(weights, strict=False)
