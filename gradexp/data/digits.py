"""scikit-learn's bundled digits: 1,797 grey images of 8x8 pixels, here enlarged; needs no file and no network."""

import numpy as np

from gradexp.data import subsets
from gradexp.data.dataset import ImageData
from gradexp.data.sources import Split

TEST_FRACTION = 0.2  # the set comes without a test split


class Digits(ImageData):
    def splits(self) -> dict[str, Split]:
        from PIL import Image
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pictures = (bunch.images * (255 / 16)).round().astype(np.uint8)
        large = [
            np.asarray(Image.fromarray(picture).resize((self.size, self.size), Image.Resampling.BILINEAR))
            for picture in pictures
        ]
        images = np.stack(large)[:, None].repeat(self.channels, axis=1)
        labels = bunch.target.astype(np.int64)
        kept, held_out = subsets.split_off(labels, fraction=TEST_FRACTION, seed=0)
        return {"train": Split(images[kept], labels[kept]), "test": Split(images[held_out], labels[held_out])}
