"""Saliency maps of a whole data set, once a method: what ROAR removes pixels by (§3.5.2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from gradexp.base.files import reserve, sha256, write_atomically
from gradexp.data.loader import Loader, mix
from gradexp.data.removal import MANIFEST
from gradexp.engine.evaluation import SHORT
from gradexp.engine.progress import Progress
from gradexp.engine.run import Config, Run
from gradexp.engine.task import Result, Sizes, Upstream, images_of
from gradexp.evaluate import masking
from gradexp.saliency import Saliency
from gradexp.tasks.saliency_score import SaliencyTask, completeness

CHUNK = 128  # images computed at a time; what is drawn for an image depends on it


class SaliencyMaps(SaliencyTask):
    """The pixels' order of salience for all training and test images, as `train.npy` and `test.npy` in the run's folder.

    Order, not values: it is all that removal needs, exact in two bytes, and equal values are put in order only once.
    Goes on where it was interrupted; `maps.json`, written last, has checksums and the fingerprint of the images.
    """

    product: ClassVar[str] = MANIFEST

    def __call__(self, run: Run, upstream: Upstream) -> Result:
        look, model, method = self.parts(run, upstream)
        data, device = look.data, look.hardware.device
        loaders = {
            "train": data.train_loader(batch_size=CHUNK, device=device, augment=False),
            "test": data.test_loader(batch_size=CHUNK, device=device),
        }
        run.folder.mkdir(parents=True, exist_ok=True)
        weights = upstream["model"].digest
        for number, (split, loader) in enumerate(loaders.items()):
            seed = mix(run.config["seed"], number)
            fill(run.folder / f"{split}.npy", loader, model, method, seed, weights, f"saliency maps {run.id}, {split}")
        checksums = {f"{split}.npy": sha256(run.folder / f"{split}.npy") for split in loaders}
        manifest = {"sha256": checksums, "data": data.fingerprint()}
        write_atomically(run.folder / MANIFEST, json.dumps(manifest, indent=2).encode())
        metrics: dict[str, Any] = {f"maps/{split}": loader.count for split, loader in loaders.items()}
        for name, values in completeness(method, model, next(iter(loaders["test"])).images).items():
            metrics |= {f"test/{name}": float(values.mean()), f"test/{name}/std": float(values.std())}
        return Result(metrics, facts={"sha256": checksums, **look.facts()})

    def work(self, config: Config, sizes: Sizes) -> float | None:
        train, test = images_of(config, sizes)
        return None if train is None or test is None else float(train + test)

    def shortened(self, config: Config, n: int) -> Config | None:
        """The same maps, of a few test images."""
        score = {"_target_": "gradexp.tasks.saliency_score.SaliencyScore"}
        evaluate = {"_target_": "gradexp.evaluate.pixel_perturbation.PixelPerturbation", "fractions": [0.5], "order": "least"}
        return config | {"task": score, "evaluate": evaluate | {"fill": "black", "images": SHORT * n, "batch_size": CHUNK}}

    def leaves(self, config: Config, sizes: Sizes) -> float | None:
        images = self.work(config, sizes)
        return None if images is None else 2 * images * config["data"]["size"] ** 2 / 2**20  # two bytes a pixel


def fill(path: Path, loader: Loader, model: nn.Module, method: Saliency, seed: int, weights: str, title: str) -> None:
    """Writes ranks (N, 1, H, W) chunk by chunk.

    `path`.done names the digest of the model's weights and counts the finished chunks: those of other weights don't count.
    """
    shape = (loader.count, 1, *loader.example.shape[-2:])
    done_file = path.with_suffix(".done")
    made_by, _, count = (done_file.read_text() if path.exists() and done_file.exists() else "").partition(" ")
    done = int(count) if made_by == weights else 0
    kind = np.dtype(np.int16 if shape[-1] * shape[-2] < 2**15 else np.int32)
    places = np.lib.format.open_memmap(path, mode="r+" if done else "w+", dtype=kind, shape=shape)
    reserve(path, path.stat().st_size)
    progress = Progress(title, len(loader), "chunks", done=done)
    for number, batch in enumerate(loader.batches(epoch=0, start=done), start=done):
        torch.manual_seed(mix(seed, number))
        ranks = masking.ranks(method(model, batch.images)[:, 0], seed=mix(seed, number))
        places[number * CHUNK :][:CHUNK, 0] = ranks.to("cpu", torch.int32).numpy()
        places.flush()
        write_atomically(done_file, f"{weights} {number + 1}".encode())
        progress.update(number + 1)
