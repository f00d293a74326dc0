"""Discriminative pixel perturbation (§5.5.2): accuracy while the least salient pixels disappear."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch
from gradexp.errors import UserError
from gradexp.evaluate.masking import least_salient, ranks, remove


def saliency(gradient: Tensor, kind: str) -> Tensor:
    """`channel_std`: standard deviation of the signed gradient over channels; `magnitude`: sum of its absolute values.

    gradient (B, C, H, W) -> (B, H, W).
    """
    if kind == "channel_std":
        return gradient.std(1, correction=0)
    if kind == "magnitude":
        return gradient.abs().sum(1)
    raise UserError(f"saliency={kind}: it is channel_std or magnitude")


def explained_class(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """Whose logit-gradient explains: the class that the perturbed model predicts (`top`), or the image's (`label`). -> (B,)."""
    if target not in ("top", "label"):
        raise UserError(f"target={target}: it is top or label")
    return logits.argmax(1) if target == "top" else labels


def check(*, fractions: Sequence[float], kind: str, target: str, replacement: str | float) -> None:
    """Raises UserError for what `discriminative_perturbation` can't do, by doing it to one pixel."""
    pixel = torch.zeros(1, 1, 1, 1)
    places = ranks(saliency(pixel, kind), seed=0)
    explained_class(pixel[..., 0, 0], torch.zeros(1, dtype=torch.long), target)
    for fraction in fractions:
        remove(pixel, least_salient(places, fraction), replacement)


@torch.no_grad()
def discriminative_perturbation(
    model: nn.Module,
    explainer: nn.Module,
    batches: Iterable[Batch],
    *,
    fractions: Sequence[float],
    kind: str,
    target: str,
    replacement: str | float,
    seed: int,
) -> dict[str, list[float]]:
    """Accuracy of `model` (percent) after removing fractions of pixels, least salient first by `explainer`'s gradients.

    `accuracy`: among all images; `accuracy/correct`: among those that the model classifies correctly untouched. Both
    models are in eval mode. kind: see saliency; target: see explained_class; replacement: see masking.remove.
    """
    right = torch.zeros(len(fractions), 2, dtype=torch.long)
    total = torch.zeros(2, dtype=torch.long)
    for images, labels, *_ in batches:
        logits = model(images)
        first = logits.argmax(1) == labels
        gradient = gradients.input_gradient(explainer, images, explained_class(logits, labels, target))
        places = ranks(saliency(gradient, kind), seed=seed)
        total += torch.tensor([len(labels), int(first.sum())])
        for i, fraction in enumerate(fractions):
            still = model(remove(images, least_salient(places, fraction), replacement)).argmax(1) == labels
            right[i] += torch.tensor([int(still.sum()), int((still & first).sum())])
    percents = 100 * right.double() / total  # NaN where no image is classified correctly
    return {
        "removed": list(fractions),
        "accuracy": percents[:, 0].tolist(),
        "accuracy/correct": percents[:, 1].tolist(),
    }
