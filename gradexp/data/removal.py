"""Remove and retrain (§3.5.2): a data set whose most salient pixels are replaced while it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.base.ranges import Fraction
from gradexp.base.texts import read_json

MANIFEST = "maps.json"  # written last: its presence means that the maps are complete


class Removal:
    """`fraction` of each image's pixels, the most salient first, become the mean colour of the training set.

    The order of the pixels is read from the maps of another run (`open`).
    """

    def __init__(self, *, fraction: Fraction) -> None:
        if not 0 < fraction <= 1:
            raise UserError(f"data.removal.fraction={fraction}: it is above 0 and at most 1; data.removal=null removes nothing")
        self.fraction = fraction
        self._folder: Path | None = None

    def open(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Reads the ranks that a `saliency_maps` run left in `folder`, of the images that `fingerprint` describes.

        Raises UserError where they are damaged or belong to other images.
        """
        advice = f"delete {folder}, and the maps are computed again"
        self._folder, manifest = folder, read_json(folder / MANIFEST, advice)
        digests = manifest.get("sha256")
        for file in ("train.npy", "test.npy"):
            recorded = digests.get(file) if isinstance(digests, dict) else None
            if not (folder / file).exists() or sha256(folder / file) != recorded:
                raise UserError(f"{folder / file} is missing or damaged; {advice}")
        if manifest.get("data") != fingerprint:
            raise UserError(
                f"the saliency maps in {folder} are of other images than this run's; give upstream.maps the same data, "
                f"data.per_class and data.subset_seed"
            )

    def mask(self, split: str) -> np.ndarray:
        """Which pixels are replaced, for the images of `train` or `test` in the order of the loader. (N, 1, H, W) bool."""
        if self._folder is None:
            raise UserError("data.removal needs the maps of an upstream run; use it with experiment=roar")
        places = np.load(self._folder / f"{split}.npy", mmap_mode="r")
        pixels = places[0].size
        return np.asarray(places >= pixels - round(self.fraction * pixels))
