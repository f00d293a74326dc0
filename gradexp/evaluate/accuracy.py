"""Test accuracy."""

from collections.abc import Iterable

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch
from gradexp.gradients import evaluating

EVALUATION_BATCH = 512  # images at a time where nothing is differentiated


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[Batch], *, classes: int, device: torch.device) -> float:
    """Percentage of images whose largest logit is that of their label; `model` is left as it was."""
    counted = MulticlassAccuracy(num_classes=classes, average="micro").to(device)
    with evaluating(model):
        for batch in batches:
            counted.update(model(batch.images), batch.labels)
    return round(100 * float(counted.compute()), 4)


def accuracy_on_test(model: nn.Module, data: ImageData, device: torch.device) -> float:
    """The same over all test images of a data set."""
    batches = data.test_loader(batch_size=EVALUATION_BATCH, device=device)
    return accuracy(model, batches, classes=data.classes, device=device)
