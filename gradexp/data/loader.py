"""Batches straight from a tensor on the device: no worker processes, no Python per image.

Every epoch's order and views are a function of (seed, epoch), drawn on the CPU: the same on every device,
and the same after a resume.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradexp.base.errors import UserError
from gradexp.data.sources import Split


class Batch(NamedTuple):
    """images (B, C, H, W) float, labels (B,), row (B,): among the images of the loader, view (B,): which crop and flip.

    Images and labels are on the device, row and view, by which a teacher's targets are read, on the CPU.
    share: (number of the first image, number of all images) where this is a process's part of a batch, None for a whole one.
    """

    images: Tensor
    labels: Tensor
    row: Tensor
    view: Tensor
    share: tuple[int, int] | None = None


class Loader(ABC):
    """The order in which images are shown, and the view of each: a function of (seed, epoch). A subclass makes batches.

    labels (N,); mean, std (C,) of pixels in [0, 1]. flip: mirror half of the images. crop: a random window, moved by up
    to this many pixels in each direction. Without shuffling, order and view are the identity.
    """

    def __init__(
        self,
        labels: Any,
        *,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        flip: bool = False,
        crop: int = 0,
        seed: int = 0,
    ) -> None:
        self.count = len(labels)
        self.labels = torch.as_tensor(labels).to(device)
        self.batch_size, self.shuffle, self.flip, self.crop, self.seed = batch_size, shuffle, flip, crop, seed
        self.scale = (1 / (255 * std)).view(-1, 1, 1).to(device)
        self.shift = (mean / std).view(-1, 1, 1).to(device)
        # A lone image has no batch statistics: at the end of a shuffled epoch it joins the batch before it.
        self.lone = int(shuffle and self.count > batch_size and self.count % batch_size == 1)
        if shuffle and self.count < 2:
            raise UserError("one training image has no batch statistics; raise data.per_class")

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Sixteen digits that name the images, their normalisation and the order in which they are shown."""

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """One black image as a model sees it, (1, C, H, W): for sizes, where values do not matter."""

    @abstractmethod
    def batch(self, rows: Tensor, view: Tensor) -> Batch:
        """These images as seen through these views."""

    def __len__(self) -> int:
        return -(-self.count // self.batch_size) - self.lone

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(epoch=0)

    def batches(self, epoch: int, start: int = 0, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of one pass over the images, from number `start` on; of each, the part of process `rank` of `world`."""
        order, view = self._draw(epoch)
        rows = list(torch.split(order, self.batch_size))
        if self.lone:
            rows[-2:] = [torch.cat(rows[-2:])]
        parts = [each.tensor_split(world) for each in rows[start:]]
        made = self._made([(each[rank], view[each[rank]]) for each in parts])
        if world == 1:
            return made
        shares = ((sum(map(len, each[:rank])), sum(map(len, each))) for each in parts)
        return (batch._replace(share=share) for batch, share in zip(made, shares, strict=True))

    def _made(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """The batches of these rows and views, in order."""
        return (self.batch(rows, view) for rows, view in wanted)

    @property
    def views(self) -> int:
        """How many ways there are to see an image."""
        return (1 + self.flip) * (2 * self.crop + 1) ** 2

    def key(self, rows: Tensor, view: Tensor) -> Tensor:
        """One number for an image and a view."""
        return rows * self.views + view

    def visited(self, steps: int) -> Tensor:
        """The keys, in ascending order, of all that the first `steps` batches of a training show."""
        keys = []
        for epoch in range(-(-steps // len(self))):
            order, view = self._draw(epoch)
            left = steps - epoch * len(self)
            shown = order if left >= len(self) else order[: left * self.batch_size]
            keys.append(self.key(shown, view[shown]))
        return torch.unique(torch.cat(keys))

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        count = self.count
        if not self.shuffle:
            return torch.arange(count), torch.zeros(count, dtype=torch.long)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        return torch.randperm(count, generator=generator), torch.randint(self.views, (count,), generator=generator)


class TensorLoader(Loader):
    """Iterates over the images at `indices` once per epoch, normalised and augmented on the device.

    crop: pad by this many black pixels and cut a random window of the original size. removed: pixels (N, 1, H, W) that
    are replaced by the colour `fill` (C,) in [0, 1] before augmentation. options: as for Loader.
    """

    def __init__(self, split: Split, indices: Any, *, removed: Any = None, fill: Tensor | None = None, **options: Any) -> None:
        super().__init__(split.labels[indices], **options)
        device = self.labels.device
        self.images = torch.as_tensor(split.images[split.rows(indices)]).to(device)
        self.removed = None if removed is None else torch.as_tensor(removed).to(device)
        self.fill = (255 * (torch.zeros(1) if fill is None else fill)).view(-1, 1, 1).to(device)

    @property
    def fingerprint(self) -> str:
        numbers = [self.images.cpu(), self.labels.cpu(), self.scale.cpu(), self.shift.cpu()]
        digest = hashlib.sha256(b"".join(values.numpy().tobytes() for values in numbers))
        digest.update(repr((self.batch_size, self.flip, self.crop, self.seed)).encode())
        if self.removed is not None:
            digest.update(self.removed.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def example(self) -> Tensor:
        return torch.zeros(1, *self.images.shape[1:], device=self.images.device)

    def batch(self, rows: Tensor, view: Tensor) -> Batch:
        device = self.images.device
        chosen = send(rows, device)
        images = self.images[chosen]
        if self.removed is not None:
            images = torch.where(self.removed[chosen], self.fill, images.float())
        if self.views > 1:
            images = _see(images, send(view, device), flip=self.flip, crop=self.crop)
        images = (images * self.scale - self.shift).contiguous(memory_format=torch.channels_last)
        return Batch(images, self.labels[chosen], rows, view)


class TrainingStream:
    """A whole training as one sequence of `steps` batches, pass after pass.

    To the trainer it is a single long epoch, so that a checkpoint can be taken after any step: the state is the number of
    batches given so far, by whatever number of processes.
    rank, world: this process gives its part of every batch.
    """

    def __init__(self, loader: Loader, steps: int, *, rank: int = 0, world: int = 1) -> None:
        self.loader, self.steps, self.step, self.rank, self.world = loader, steps, 0, rank, world
        last = loader.count - (len(loader) - 1) * loader.batch_size
        if min(last, loader.batch_size) < world:
            raise UserError(
                f"{world} devices can't share a batch of {min(last, loader.batch_size)} images, such as the last of a pass; "
                f"take fewer devices"
            )

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        while self.step < self.steps:
            epoch, start = divmod(self.step, len(self.loader))
            for batch in self.loader.batches(epoch, start, rank=self.rank, world=self.world):
                if self.step == self.steps:
                    return
                self.step += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def _see(images: Tensor, view: Tensor, *, flip: bool, crop: int) -> Tensor:
    """images (B, C, H, W) seen through `view` (B,) = (mirrored * side + row) * side + column, side = 2 crop + 1."""
    side = 2 * crop + 1
    if crop:
        size = images.shape[-2:]
        windows = torch.nn.functional.pad(images, (crop,) * 4).unfold(2, size[0], 1).unfold(3, size[1], 1)
        rows, columns = view // side % side, view % side
        images = windows[torch.arange(len(images), device=view.device), :, rows, columns]
    if flip:
        mirrored = (view // side**2 == 1).view(-1, 1, 1, 1)
        images = torch.where(mirrored, images.flip(3), images)
    return images


def send(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device. A GPU copies them from pinned memory, and neither it nor this process waits for the other."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def mix(seed: int, number: int) -> int:
    """One generator seed for a pair; the epochs (or steps) of neighbouring seeds do not repeat each other."""
    return (seed * 1_000_003 + number) % 2**63
