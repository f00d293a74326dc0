"""The base class of data sets: splits, normalisation, subsets, loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Gt, Lt

from gradexp.base.errors import UserError, choose
from gradexp.base.ranges import Count, Index
from gradexp.data import sources, subsets
from gradexp.data.loader import Loader, TensorLoader
from gradexp.data.parquet import Layout
from gradexp.data.removal import Removal


class ImageData:
    """A data set as a run sees it.

    only_classes: the labels that are kept, in the order of their new numbers; None for all. per_class: training images
    per class, None for all. flip, crop: augmentation of the training images.
    normalise: `standard` (per-channel mean and standard deviation of the whole training set) or `none`
    (pixels in [0, 1]). validation: fraction of the training set that is held out before subsets are drawn,
    and takes the test set's place. subset_seed: of the subset, None for `seed`. removal: pixels to replace (ROAR).
    """

    layout: ClassVar[Layout]

    def __init__(
        self,
        *,
        name: str,
        classes: Count,
        channels: Count,
        size: Count,
        per_class: Count | None,
        flip: bool,
        crop: Index,
        normalise: str,
        validation: Annotated[float, Gt(0), Lt(1)] | None,
        root: Path,
        cache: Path,
        seed: Index,
        subset_seed: Index | None = None,
        removal: Removal | None = None,
        only_classes: Sequence[Index] | None = None,
    ) -> None:
        choose("data.normalise", normalise, "standard", "none")
        if only_classes is not None and len(only_classes) != classes:
            raise UserError(f"data.only_classes names {len(only_classes)} classes, data.classes={classes}: make them agree")
        if only_classes is not None and len(set(only_classes)) < len(only_classes):
            raise UserError(f"data.only_classes={list(only_classes)} names a class twice: name each once")
        for key, value in (("channels", channels), ("size", size)):
            if (layout := getattr(self, "layout", None)) and value != getattr(layout, key):
                raise UserError(f"data.{key}={value}: images of {layout.title} have {getattr(layout, key)}")
        self.only_classes = only_classes
        self.name, self.classes, self.channels, self.size = name, classes, channels, size
        self.per_class, self.flip, self.crop, self.normalise = per_class, flip, crop, normalise
        self.validation, self.root, self.cache, self.seed = validation, root, cache, seed
        self.subset_seed, self.removal = seed if subset_seed is None else subset_seed, removal

    def splits(self) -> Mapping[str, Any]:
        """The whole training and test set."""
        return sources.load(self.layout, self.root, self.cache)

    @cached_property
    def _whole(self) -> Mapping[str, Any]:
        return self.splits()

    @cached_property
    def _pool(self) -> tuple[Any, np.ndarray, np.ndarray | None]:
        """The training split, the indices of it that subsets are drawn from, and those that are held out."""
        train = self._kept("train")
        if self.validation is None:
            return train, np.arange(len(train.labels)), None
        # The cut has its own fixed seed: every seed of a run is judged on the same images.
        return train, *subsets.split_off(train.labels, fraction=self.validation, seed=0)

    @cached_property
    def _training(self) -> tuple[Any, np.ndarray]:
        """(split, indices) to train on."""
        train, pool, _ = self._pool
        if self.classes != (count := int(train.labels.max()) + 1):
            raise UserError(f"data.classes={self.classes}: {self.name} has {count}")
        return train, pool[subsets.nested(train.labels[pool], per_class=self.per_class, seed=self.subset_seed)]

    @cached_property
    def _testing(self) -> tuple[Any, np.ndarray]:
        """(split, indices) to evaluate on."""
        if self.validation is not None:
            train, _, held_out = self._pool
            assert held_out is not None
            return train, held_out
        test = self._kept("test")
        return test, np.arange(len(test.labels))

    def _kept(self, name: str) -> Any:
        try:
            split = self._whole[name]
        except KeyError:
            known = ", ".join(self._whole) or "nothing"
            raise UserError(f"data={self.name}: its splits() have {known}, and no {name}; add it") from None
        return split if self.only_classes is None else split.only(self.only_classes)

    @property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation by which pixels in [0, 1] are normalised; (C,) each."""
        if self.normalise == "none":
            return torch.zeros(self.channels), torch.ones(self.channels)
        return self.colours

    def names(self) -> Sequence[str]:
        """Names of all classes in the order of their labels; empty where the data set has none."""
        return self.layout.names if hasattr(self, "layout") else ()

    def class_names(self, labels: Sequence[int]) -> list[str]:
        """Names of the classes of these labels; their numbers where they have no names."""
        original = [self.only_classes[label] if self.only_classes is not None else label for label in labels]
        names = self.names()
        return [names[label] if names else str(label) for label in original]

    @property
    def black(self) -> torch.Tensor:
        """The value of a black pixel after normalisation; (C, 1, 1)."""
        mean, std = self.statistics
        return (-mean / std).view(-1, 1, 1)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images as pixels: (B, C, H, W) -> uint8."""
        mean, std = (values.view(-1, 1, 1).to(images.device) for values in self.statistics)
        return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @property
    def colours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-channel mean and standard deviation of the training set's pixels in [0, 1]; (C,) each."""
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in self._whole["train"].colours)
        return mean, std

    def train_loader(self, *, batch_size: int, device: torch.device | str, augment: bool = True) -> Loader:
        """Shuffled training batches; `augment=False` gives the images once, in order, as they are."""
        options: dict[str, Any] = {"shuffle": True, "flip": self.flip, "crop": self.crop} if augment else {}
        options |= self._removal("train")
        return self._loader(*self._training, batch_size, device, **options)

    def test_loader(self, *, batch_size: int, device: torch.device | str) -> Loader:
        """The test set (or the validation split), in order."""
        return self._loader(*self._testing, batch_size, device, **self._removal("test"))

    def _removal(self, split: str) -> dict[str, Any]:
        return {} if self.removal is None else {"removed": self.removal.mask(split), "fill": self.colours[0]}

    def _loader(self, split: Any, indices: np.ndarray, batch_size: int, device: Any, **options: Any) -> Loader:
        mean, std = self.statistics
        return TensorLoader(split, indices, batch_size=batch_size, mean=mean, std=std, device=device, seed=self.seed, **options)

    def fingerprint(self) -> dict[str, Any]:
        """Contents, subset and counts, for the record of a run. Raises UserError where packed data lacks one of the images."""
        (train, chosen), (test, evaluated) = self._training, self._testing
        train.rows(chosen)
        test.rows(evaluated)
        return {
            "name": self.name,
            "train": train.fingerprint,
            "subset": subsets.fingerprint(chosen),
            "train_images": len(chosen),
            "test": test.fingerprint,
            "test_images": len(evaluated),
        }
