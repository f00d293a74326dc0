"""MNIST: 60,000 + 10,000 grey images of handwritten digits (LeCun, Cortes, Burges)."""

from gradexp.data.dataset import ImageData
from gradexp.data.parquet import Layout


class MNIST(ImageData):
    layout = Layout(
        name="mnist",
        title="MNIST",
        classes=10,
        channels=1,
        size=28,
        image_column="image",
        label_column="label",
        torchvision="MNIST",
        images=(60_000, 10_000),
    )
