"""CIFAR-100: 50,000 + 10,000 colour images of 100 classes (Krizhevsky, 2009)."""

from gradexp.data.dataset import ImageData
from gradexp.data.parquet import Layout

NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle caterpillar
cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl
hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


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
        images=(50_000, 10_000),
        names=tuple(name.replace("_", " ") for name in NAMES.split()),  # the fine labels
    )
