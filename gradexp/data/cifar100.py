"""CIFAR-100: 50,000 + 10,000 colour images of 100 classes (Krizhevsky, 2009)."""

from gradexp.data.dataset import ImageData
from gradexp.data.sources import Layout


class CIFAR100(ImageData):
    layout = Layout(
        name="cifar100",
        title="CIFAR-100",
        classes=100,
        channels=3,
        size=32,
        image_column="img",
        label_column="fine_label",
        torchvision="CIFAR100",
    )
