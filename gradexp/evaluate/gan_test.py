"""GAN-test: accuracy of an independent classifier on class-conditional samples (Shmelkov et al., 2018; §5.5.1)."""

import torch
from torch import Tensor, nn

from gradexp.evaluate.accuracy import EVALUATION_BATCH


@torch.inference_mode()
def gan_test(judge: nn.Module, samples: Tensor, labels: Tensor, *, confidence: float) -> dict[str, float]:
    """Accuracy of `judge`, in eval mode, on samples, in percent, with its exact binomial interval (Clopper and Pearson).

    samples (N, C, H, W), labels (N,): the classes that they were sampled for. NaN if any sample is not finite, as from a model
    that diverged.
    """
    if not samples.isfinite().all():
        return dict.fromkeys(("gan_test", "gan_test/low", "gan_test/high"), float("nan"))
    batches = zip(torch.split(samples, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
    correct = sum(int((judge(images).argmax(1) == classes).sum()) for images, classes in batches)
    from scipy.stats import binomtest  # which takes a second to import

    interval = binomtest(correct, len(labels)).proportion_ci(confidence_level=confidence, method="exact")
    percents = {"gan_test": correct / len(labels), "gan_test/low": interval.low, "gan_test/high": interval.high}
    return {name: round(100 * float(value), 4) for name, value in percents.items()}
