"""GAN-test: accuracy of an independent classifier on class-conditional samples (Shmelkov et al., 2018; §5.5.1)."""

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

BATCH = 512


@torch.inference_mode()
def gan_test(judge: nn.Module, samples: Tensor, labels: Tensor, *, confidence: float) -> dict[str, float]:
    """Accuracy of `judge`, in eval mode, on samples, in percent, with its exact binomial interval (Clopper and Pearson).

    samples (N, C, H, W), labels (N,): the classes that they were sampled for. NaN if any sample is not finite, as from a model
    that diverged.
    """
    if not samples.isfinite().all():
        return dict.fromkeys(("gan_test", "gan_test/low", "gan_test/high"), float("nan"))
    parts = [slice(start, start + BATCH) for start in range(0, len(labels), BATCH)]
    right = sum(int((judge(samples[part]).argmax(1) == labels[part]).sum()) for part in parts)
    interval = binomtest(right, len(labels)).proportion_ci(confidence_level=confidence, method="exact")
    percents = {"gan_test": right / len(labels), "gan_test/low": interval.low, "gan_test/high": interval.high}
    return {name: round(100 * float(value), 4) for name, value in percents.items()}
