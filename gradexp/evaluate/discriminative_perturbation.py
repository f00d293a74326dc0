"""Discriminative pixel perturbation (§5.5.2): accuracy while the least salient pixels disappear."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.base.errors import choose
from gradexp.data.loader import Batch
from gradexp.evaluate.masking import least_salient, ranks, remove
from gradexp.saliency.method import over_channels

SALIENCY = {"channel_std": "std", "magnitude": "abs"}  # by what is taken over channels


def saliency(gradient: Tensor, kind: str) -> Tensor:
    """`channel_std`: standard deviation of the signed gradient over channels; `magnitude`: sum of its absolute values.

    gradient (B, C, H, W) -> (B, H, W).
    """
    return over_channels(gradient, SALIENCY[choose("saliency", kind, *SALIENCY)])[:, 0]


def explained_class(logits: Tensor, labels: Tensor, target: str) -> Tensor:
    """Whose logit-gradient explains: the class that the perturbed model predicts (`top`), or the image's (`label`). -> (B,)."""
    return logits.argmax(1) if choose("target", target, "top", "label") == "top" else labels


def check(*, fractions: Sequence[float], kind: str, target: str, replacement: str | float) -> None:
    """Raises UserError for what `still_right` can't do, by doing it to one pixel."""
    pixel = torch.zeros(1, 1, 1, 1)
    places = ranks(saliency(pixel, kind), seed=0)
    explained_class(pixel[..., 0, 0], torch.zeros(1, dtype=torch.long), target)
    for fraction in fractions:
        remove(pixel, least_salient(places, fraction), replacement)


@torch.no_grad()
def still_right(
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
    """How many images `model` classifies correctly after fractions of pixels went, least salient first by `explainer`'s
    gradients: of all (column 0), and of those that it classifies correctly untouched (column 1). The last row counts these.

    Both models are in eval mode. kind: see saliency; target: see explained_class; replacement: see masking.remove.
    -> (fractions + 1, 2) integers, of which those of several batches may be added.
    """
    images, labels, *_ = batch
    logits = model(images)
    first = logits.argmax(1) == labels
    gradient = gradients.input_gradient(explainer, images, explained_class(logits, labels, target))
    places = ranks(saliency(gradient, kind), seed=seed)
    counts = []
    for fraction in fractions:
        still = model(remove(images, least_salient(places, fraction), replacement)).argmax(1) == labels
        counts.append([int(still.sum()), int((still & first).sum())])
    return torch.tensor([*counts, [len(labels), int(first.sum())]])


def accuracies(fractions: Sequence[float], counts: Tensor) -> dict[str, list[float]]:
    """`accuracy` among all images, `accuracy/correct` among those that were classified correctly untouched (percent)."""
    percents = 100 * counts[:-1].double() / counts[-1]  # NaN where no image is classified correctly
    return {
        "removed": list(fractions),
        "accuracy": percents[:, 0].tolist(),
        "accuracy/correct": percents[:, 1].tolist(),
    }
