"""Test accuracy."""

from collections.abc import Iterable

import torch
from torch import nn

from gradexp.data.dataset import ImageData
from gradexp.data.loader import Batch
from gradexp.gradients import evaluating

EVALUATION_BATCH = 512  # images per batch where nothing is differentiated


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[Batch], *, classes: int, device: torch.device) -> float:
    """Percentage of images whose largest logit is their label's, in eval mode; `model` keeps its mode.

    NaN where a logit is not finite.
    """
    from torchmetrics.classification import MulticlassAccuracy  # takes seconds, and make plan does without it

    metric = MulticlassAccuracy(num_classes=classes, average="micro").to(device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with evaluating(model):
        for batch in batches:
            logits = model(batch.images)
            finite &= logits.isfinite().all()
            metric.update(logits, batch.labels)
    return round(100 * float(metric.compute()), 4) if finite else float("nan")


def accuracy_on_test(model: nn.Module, data: ImageData, device: torch.device) -> float:
    """The accuracy on all test images of a data set, in percent."""
    batches = data.test_loader(batch_size=EVALUATION_BATCH, device=device)
    return accuracy(model, batches, classes=data.classes, device=device)
