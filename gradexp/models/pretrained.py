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


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file, or under `state_dict` in a checkpoint, without the prefix that DataParallel adds to names.

    Raises UserError for a file without one.
    """
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # torch raises RuntimeError, UnpicklingError, EOFError, AttributeError, ...
        content = None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} holds no state dict, or is damaged: save model.state_dict() there, or download it again")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a state dict into `model`. Raises UserError for a file that is damaged or of another architecture."""
    weights = read_weights(file)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
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
