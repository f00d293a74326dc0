"""What every data set of 32x32-like images shares: splits, normalisation, subsets, loaders."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from gradexp.data import sources, subsets
from gradexp.data.loader import TensorLoader
from gradexp.data.removal import Removal
from gradexp.data.sources import Layout, Split
from gradexp.errors import UserError


class ImageData:
    """A data set as a run sees it.

    per_class: training images per class, None for all. flip, crop: augmentation of the training images.
    normalise: `standard` (per-channel mean and standard deviation of the whole training set) or `none`
    (pixels in [0, 1]). validation: fraction of the training set that is held out before subsets are drawn,
    and takes the test set's place. subset_seed: of the subset, None for `seed`. removal: pixels to replace (ROAR).
    """

    layout: ClassVar[Layout]

    def __init__(
        self,
        *,
        name: str,
        classes: int,
        channels: int,
        size: int,
        per_class: int | None,
        flip: bool,
        crop: int,
        normalise: str,
        validation: float | None,
        root: Path,
        cache: Path,
        seed: int,
        subset_seed: int | None = None,
        removal: Removal | None = None,
    ) -> None:
        if normalise not in ("standard", "none"):
            raise UserError(f"data.normalise={normalise}: it is standard or none")
        if validation is not None and not 0 < validation < 1:
            raise UserError(f"data.validation={validation}: it is a fraction between 0 and 1, or null")
        self.name, self.classes, self.channels, self.size = name, classes, channels, size
        self.per_class, self.flip, self.crop, self.normalise = per_class, flip, crop, normalise
        self.validation, self.root, self.cache, self.seed = validation, root, cache, seed
        self.subset_seed, self.removal = seed if subset_seed is None else subset_seed, removal

    def splits(self) -> dict[str, Split]:
        """The whole training and test set."""
        return sources.load(self.layout, self.root, self.cache)

    @cached_property
    def _parts(self) -> tuple[Split, np.ndarray, Split, np.ndarray]:
        """(split, indices) to train on, (split, indices) to evaluate on."""
        splits = self.splits()
        train, test = splits["train"], splits["test"]
        pool, held_out = np.arange(len(train.labels)), None
        if self.validation is not None:
            # The cut has its own fixed seed: every seed of a run is judged on the same images.
            pool, held_out = subsets.split_off(train.labels, fraction=self.validation, seed=0)
        chosen = pool[subsets.nested(train.labels[pool], per_class=self.per_class, seed=self.subset_seed)]
        return (train, chosen, train, held_out) if held_out is not None else (train, chosen, test, np.arange(len(test.labels)))

    @property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is subtracted from pixels in [0, 1], and what they are then divided by; (C,) each."""
        if self.normalise == "none":
            return torch.zeros(self.channels), torch.ones(self.channels)
        return self.colours

    @property
    def black(self) -> torch.Tensor:
        """What a black pixel is after normalisation; (C, 1, 1)."""
        mean, std = self.statistics
        return (-mean / std).view(-1, 1, 1)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images as they look: (B, C, H, W) -> uint8."""
        mean, std = (values.view(-1, 1, 1).to(images.device) for values in self.statistics)
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @cached_property
    def colours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-channel mean and standard deviation of the training set's pixels in [0, 1]; (C,) each."""
        values = np.arange(256) / 255
        counts = np.stack([np.bincount(self._parts[0].images[:, c].reshape(-1), minlength=256) for c in range(self.channels)])
        weights = counts / counts.sum(1, keepdims=True)
        mean = weights @ values
        std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)

    def train_loader(self, *, batch_size: int, device: torch.device | str, augment: bool = True) -> TensorLoader:
        """Shuffled training batches; `augment=False` gives the images once, in order, as they are."""
        split, indices, *_ = self._parts
        options: dict[str, Any] = {"shuffle": True, "flip": self.flip, "crop": self.crop} if augment else {}
        options |= self._removal("train")
        return self._loader(split, indices, batch_size, device, **options)

    def test_loader(self, *, batch_size: int, device: torch.device | str) -> TensorLoader:
        """The test set (or the validation split), in order."""
        *_, split, indices = self._parts
        return self._loader(split, indices, batch_size, device, **self._removal("test"))

    def _removal(self, split: str) -> dict[str, Any]:
        return {} if self.removal is None else {"removed": self.removal.mask(split), "fill": self.colours[0]}

    def _loader(self, split: Split, indices: np.ndarray, batch_size: int, device: Any, **options: Any) -> TensorLoader:
        mean, std = self.statistics
        return TensorLoader(split, indices, batch_size=batch_size, mean=mean, std=std, device=device, seed=self.seed, **options)

    def fingerprint(self) -> dict[str, Any]:
        """What a record says of its data: contents, subset and counts."""
        train, chosen, test, evaluated = self._parts
        return {
            "name": self.name,
            "train": train.fingerprint,
            "subset": subsets.fingerprint(chosen),
            "train_images": len(chosen),
            "test": test.fingerprint,
            "test_images": len(evaluated),
        }
