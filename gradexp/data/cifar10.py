"""CIFAR-10: 50,000 + 10,000 colour images of 10 classes (Krizhevsky, 2009)."""

from gradexp.data.dataset import ImageData
from gradexp.data.parquet import Layout


class CIFAR10(ImageData):
    layout = Layout(
        name="cifar10",
        title="CIFAR-10",
        classes=10,
        channels=3,
        size=32,
        image_column="img",
        label_column="label",
        torchvision="CIFAR10",
        images=(50_000, 10_000),
        names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
