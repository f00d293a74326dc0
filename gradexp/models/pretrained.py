"""Torchvision's classifiers and their published weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import nn

from gradexp.base.errors import UserError, nearest


def torchvision_model(*, name: str, architecture: str, classes: int) -> nn.Module:
    """An untrained torchvision classifier whose ReLUs are not in-place, so that captured outputs are not overwritten."""
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise UserError(f"model.architecture={architecture}: torchvision has no such classifier{nearest(architecture, known)}")
    model: nn.Module = torchvision.models.get_model(architecture, weights=None, num_classes=classes)
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return model


def published_file(architecture: str) -> tuple[str, str]:
    """(file name, address) of the weights that torchvision published first."""
    published = next(iter(torchvision.models.get_model_weights(architecture)))
    return published.url.rpartition("/")[2], published.url


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a state dict into `model`. Raises UserError for a file that is damaged or of another architecture."""
    try:
        weights = torch.load(file, weights_only=True, map_location="cpu")
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, AttributeError, ...
        raise UserError(f"{file} is no readable weights file ({str(error).splitlines()[0]}); download it again") from None
    # Files from before 2017 have no num_batches_tracked.
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [name for name in expected if shapes.get(name) != expected[name] and not name.endswith("num_batches_tracked")]
    wrong += [name for name in shapes if name not in expected]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"{file} is of another architecture: {first} is {shapes.get(first, 'missing')}, the model's is "
            f"{expected.get(first, 'missing')} ({len(wrong)} entries differ); place the right file, or choose its model"
        )
    model.load_state_dict(weights, strict=False)
