"""Discriminative pixel perturbation (§5.5.2): accuracy after the least salient pixels are removed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import choose
from gradexp.data.loader import Batch
from gradexp.evaluate.masking import least_salient, ranks, remove
from gradexp.saliency.method import over_channels

SALIENCY = {"channel_std": "std", "magnitude": "abs"}  # {saliency: its name in saliency.method.over_channels}


def saliency(gradient: Tensor, kind: str) -> Tensor:
    """Saliency of a gradient: (B, C, H, W) -> (B, H, W).

    kind: `channel_std`, standard deviation of the signed gradient over channels, or `magnitude`, sum of its absolute values
    over channels. Raises UserError for another kind.
    """
    return over_channels(gradient, SALIENCY[choose("saliency", kind, *SALIENCY)])[:, 0]


def explained_class(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """Classes whose logit-gradients explain: those of the largest logits (`top`) or the labels (`label`): (B, K) -> (B,)."""
    return logits.argmax(1) if choose("target", target, "top", "label") == "top" else labels


def check(*, fractions: Sequence[float], kind: str, target: str, replacement: str | float) -> None:
    """Raises UserError for options that `count_correct` does not take, by applying them to one pixel."""
    pixel = torch.zeros(1, 1, 1, 1)
    order = ranks(saliency(pixel, kind), seed=0)
    explained_class(pixel[..., 0, 0], torch.zeros(1, dtype=torch.long), target)
    for fraction in fractions:
        remove(pixel, least_salient(order, fraction), replacement)


@torch.no_grad()
def count_correct(
    model: nn.Module,
    explainer: nn.Module,
    batch: Batch,
    *,
    fractions: Sequence[float],
    kind: str,
    target: str,
    replacement: str | float,
    seed: int,
) -> Tensor:
    """Counts of images that `model` classifies correctly after fractions of pixels are removed: integers (fractions + 1, 2).

    Pixels are removed in the order of the saliency of `explainer`'s gradients, the least salient first. Column 0 counts all
    images, column 1 those that are classified correctly before removal. The last row has the numbers of these images. Counts of
    several batches may be added. Both models must be in eval mode.
    kind: see saliency. target: see explained_class, by the logits of `model`. replacement: see masking.remove. seed: orders
    equal saliencies.
    """
    images, labels, *_ = batch
    logits = model(images)
    before = logits.argmax(1) == labels
    gradient = gradients.input_gradient(explainer, images, explained_class(logits, labels, target))
    order = ranks(saliency(gradient, kind), seed=seed)
    counts = []
    for fraction in fractions:
        after = model(remove(images, least_salient(order, fraction), replacement)).argmax(1) == labels
        counts.append([int(after.sum()), int((after & before).sum())])
    return torch.tensor([*counts, [len(labels), int(before.sum())]])


def accuracies(fractions: Sequence[float], counts: Tensor) -> dict[str, list[float]]:
    """From `count_correct`, in percent: `accuracy` of all images, `accuracy/correct` of those correct before removal."""
    percents = 100 * counts[:-1].double() / counts[-1]  # NaN where no image was correct before
    return {
        "removed": list(fractions),
        "accuracy": percents[:, 0].tolist(),
        "accuracy/correct": percents[:, 1].tolist(),
    }
