"""Classifiers of photographs with published weights, of torchvision and timm, with the preparation that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from gradexp.base.errors import UserError, nearest
from gradexp.models.pretrained import load_weights, read_weights

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of a picture
RANDOM = "random"  # instead of a file of weights


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """A network in eval mode and what it takes and returns.

    title: architecture and weights. prepare: from an RGB picture to images (1, C, H, W). region: from the size (width, height)
    of a picture to the part of it that `prepare` shows to the network. classes: names in the order of the labels, empty if
    they are unknown. mean, std: by which pixels in [0, 1] are normalised, (C, 1, 1).
    """

    title: str
    model: nn.Module
    prepare: Callable[[Image.Image], Tensor]
    region: Callable[[tuple[int, int]], Box]
    classes: Sequence[str]
    mean: Tensor
    std: Tensor


def torchvision_classifier(name: str, *, weights: str | None = None, size: int | None = None) -> Classifier:
    """A classifier of torchvision.

    weights: None for those that torchvision recommends, which are downloaded if torch hub's folder of checkpoints lacks them;
    the name of another published version; a file with a state dict; or `random`. size: pixels on a side of what the network
    gets, None for the size that belongs to the weights. Raises UserError, also for a size that the network does not take.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(f"--model torchvision:{name}: torchvision has no such classifier{nearest(name, known)}")
    published = torchvision.models.get_model_weights(name)
    versions = {version.name: version for version in published}
    version = versions.get(weights or "", published.DEFAULT)
    if weights is None or weights in versions:
        model, title = _downloaded(name, version), f"{name}, torchvision's {version.name}"
    elif weights == RANDOM:
        torch.manual_seed(0)
        model, title = _untrained(name), f"{name}, RANDOM WEIGHTS"
    else:
        model, title = _from_file(name, Path(weights), versions), f"{name}, {Path(weights).name}"
    *_, last = model.state_dict().values()  # the bias of the classes
    preset = version.transforms()
    if size is not None:
        preset = version.transforms(crop_size=size, resize_size=round(size * preset.resize_size[0] / preset.crop_size[0]))
    classifier = Classifier(
        title=title,
        model=model.eval(),
        prepare=lambda picture: preset(picture)[None],
        region=lambda picture: central(picture, preset.crop_size[0] / preset.resize_size[0]),
        classes=names if len(names := version.meta["categories"]) == len(last) else [],
        mean=torch.tensor(preset.mean).view(-1, 1, 1),
        std=torch.tensor(preset.std).view(-1, 1, 1),
    )
    return _checked(classifier, size)


def timm_classifier(name: str, *, weights: str | None = None, size: int | None = None) -> Classifier:
    """A classifier of timm, which must be installed. weights, size: as for torchvision_classifier; timm downloads weights."""
    try:
        import timm
        from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
    except ImportError:
        raise UserError(f"--model timm:{name} needs timm, which is not installed: pip install timm") from None
    if not timm.is_model(name):
        raise UserError(f"--model timm:{name}: timm has no such model{nearest(name, timm.list_models())}")
    torch.manual_seed(0)
    file = {} if weights in (None, RANDOM) else {"checkpoint_path": weights}
    try:
        model = timm.create_model(name, pretrained=weights is None, **file)
    except Exception as error:  # timm and huggingface_hub raise errors of many types
        raise UserError(
            f"the weights of timm:{name} can't be loaded ({_first_line(error)}); place them in the cache of huggingface_hub, "
            f"or give --weights FILE or --weights random"
        ) from None
    title = f"{name}, " + ("RANDOM WEIGHTS" if weights == RANDOM else Path(weights).name if weights else "timm's weights")
    settings = resolve_model_data_config(model) | {"crop_mode": "center"}
    settings |= {} if size is None else {"input_size": (3, size, size)}
    transform = create_transform(**settings, is_training=False)
    names = ImageNetInfo().label_descriptions() if model.num_classes == 1000 else []
    classifier = Classifier(
        title=title,
        model=model.eval(),
        prepare=lambda picture: transform(picture)[None],
        region=lambda picture: central(picture, settings["crop_pct"]),
        classes=names,
        mean=torch.tensor(settings["mean"]).view(-1, 1, 1),
        std=torch.tensor(settings["std"]).view(-1, 1, 1),
    )
    return _checked(classifier, size)


def central(picture: tuple[int, int], fraction: float = 1.0) -> Box:
    """The square in the middle of a picture (width, height) whose side is a fraction of the short side."""
    width, height = picture
    side = min(1.0, fraction) * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _downloaded(name: str, version: Any) -> nn.Module:
    file = Path(torch.hub.get_dir()) / "checkpoints" / version.url.rpartition("/")[2]
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=version)
    except Exception as error:  # URLError, OSError, RuntimeError, UnpicklingError, ...
        if file.exists():
            raise UserError(f"{file} is no readable weights file ({_first_line(error)}); delete it and try again") from None
        raise UserError(
            f"the weights of {name} are not on this disk and can't be downloaded ({_first_line(error)}). Place {file}, from "
            f"{version.url}, or give --weights FILE or --weights random"
        ) from None
    return model


def _untrained(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False, "transform_input": True} | options
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _from_file(name: str, file: Path, versions: Iterable[str]) -> nn.Module:
    """The network with the state dict of a file, which may have another number of classes than the published weights."""
    if not file.is_file():
        raise UserError(f"--weights {file}: no such file; give a state dict, {RANDOM} or {' or '.join(versions)}")
    state = read_weights(file)
    *_, last = state.values()
    classes = len(last) if last.ndim else 0
    options = {"aux_logits": True} if any(key.lower().startswith("aux") for key in state) else {}
    model = _untrained(name, num_classes=classes, **options)
    load_weights(model, file)
    return model


def _checked(classifier: Classifier, size: int | None) -> Classifier:
    """Raises UserError where the network does not take images of `size`, such as a transformer with fixed positions."""
    if size is not None:
        try:
            with torch.no_grad():
                classifier.model(torch.zeros(1, 3, size, size))
        except Exception as error:
            raise UserError(
                f"--size {size}: {classifier.title} does not take images of this size ({_first_line(error)})"
            ) from None
    return classifier


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
