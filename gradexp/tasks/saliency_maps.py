"""Saliency maps of a data set by one method, by which ROAR removes pixels (§3.5.2)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gradexp.base.files import sha256, write_atomically
from gradexp.data.loader import Loader, mix
from gradexp.data.removal import MANIFEST
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream, images_of
from gradexp.evaluate import masking
from gradexp.saliency import Saliency
from gradexp.tasks.saliency_score import SaliencyTask, completeness

CHUNK = 128  # images per batch; the noise drawn for an image depends on it


class SaliencyMaps(SaliencyTask):
    """Ranks of the pixels of all training and test images by saliency, as `train.npy` and `test.npy` in the run's folder.

    Removal needs only ranks, which are exact in two bytes, and equal values are thus ordered once. `maps.json`, written last,
    has the checksums and the fingerprint of the images.
    Metrics: `maps/train` and `maps/test`, numbers of images; `test/completeness_error` of the first test batch.
    """

    product: ClassVar[str] = MANIFEST

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        evaluation, model, method = self.parts(run, upstream)
        data, device = evaluation.data, evaluation.hardware.device
        loaders = {
            "train": data.train_loader(batch_size=CHUNK, device=device, augment=False),
            "test": data.test_loader(batch_size=CHUNK, device=device),
        }
        run.folder.mkdir(parents=True, exist_ok=True)
        for number, (split, loader) in enumerate(loaders.items()):
            ranks = partial(ranks_of, loader, model, method, mix(run.config["seed"], number))
            chunks = evaluation.pieces.each(split, torch.split(torch.arange(loader.count), CHUNK), ranks)
            np.save(run.folder / f"{split}.npy", torch.cat(chunks)[:, None].numpy())
        checksums = {f"{split}.npy": sha256(run.folder / f"{split}.npy") for split in loaders}
        manifest = {"sha256": checksums, "data": data.fingerprint()}
        write_atomically(run.folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        metrics: dict[str, Any] = {f"maps/{split}": loader.count for split, loader in loaders.items()}
        for name, values in completeness(method, model, next(iter(loaders["test"])).images).items():
            metrics |= {f"test/{name}": float(values.mean()), f"test/{name}/std": float(values.std())}
        return Result(metrics, facts={"sha256": checksums, **evaluation.facts()})

    def work(self, config: Config, sizes: Sizes) -> float | None:
        train, test = images_of(config, sizes)
        return None if train is None or test is None else float(train + test)

    def leaves(self, config: Config, sizes: Sizes) -> float | None:
        images = self.work(config, sizes)
        return None if images is None else 2 * images * config["data"]["size"] ** 2 / 2**20  # two bytes a pixel


def ranks_of(loader: Loader, model: nn.Module, method: Saliency, seed: int, number: int, rows: Tensor) -> Tensor:
    """The ranks (n, H, W) of the pixels of one chunk of images, in two bytes where they fit."""
    images = loader.batch(rows, torch.zeros_like(rows)).images
    torch.manual_seed(mix(seed, number))
    ranks = masking.salient_ranks(model, images, method, seed=mix(seed, number))
    return ranks.to("cpu", torch.int16 if images[0, 0].numel() < 2**15 else torch.int32)
