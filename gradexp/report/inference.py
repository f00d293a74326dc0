"""Intervals and tests for differences of a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

BOOTSTRAP_FROM = 6  # seeds; resampled means stay in [min, max], which covers the mean with 93.75 % at best for 5 seeds


@dataclass(frozen=True)
class Estimate:
    """A mean difference over n seeds or images, with its interval and one-sided p-values; NaN for what can't be estimated."""

    mean: float
    n: int
    std: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_for: float = math.nan
    p_against: float = math.nan


def estimate(differences: Sequence[float], *, confidence: float, resamples: int) -> Estimate:
    """Mean of paired differences, one per seed, positive if they agree with the claim.

    p-values are Student's. From BOOTSTRAP_FROM seeds on, the interval is a percentile bootstrap of the mean at a level
    widened for few seeds (Hesterberg, 2015, "What teachers should know about the bootstrap", expanded percentile interval);
    below, it is Student's. Both are NaN for one seed, for seeds without spread, and if the run of a seed diverged, which
    makes its difference infinite or NaN.
    """
    d, n = np.asarray(differences, dtype=float), len(differences)
    mean = float(d.mean())
    if n < 2 or not np.isfinite(d).all():
        return Estimate(mean, n)
    std = float(d.std(ddof=1))
    if std < 1e-9:
        return Estimate(mean, n, std)
    error, freedom = std / math.sqrt(n), n - 1
    p_for, p_against = (float(tail(mean / error, freedom)) for tail in (stats.t.sf, stats.t.cdf))
    if n < BOOTSTRAP_FROM:
        low, high = stats.t.interval(confidence, freedom, mean, error)
    else:
        quantile = stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(n / freedom)
        level = 2 * float(stats.norm.cdf(quantile)) - 1
        options: dict[str, Any] = {"n_resamples": resamples, "method": "percentile", "rng": np.random.default_rng(0)}
        low, high = stats.bootstrap((d,), np.mean, confidence_level=level, **options).confidence_interval
    return Estimate(mean, n, std, float(low), float(high), p_for, p_against)


def estimate_over_images(mean: float, noise: float, n: int, confidence: float) -> Estimate:
    """Difference of means over n images of one model: the images are the sample, the model is fixed (normal theory).

    noise: its standard error, computed as if the two means were over different images, because records keep only means and
    deviations. They are over the same images, so it is conservative if the same images are hard for both methods.
    """
    if not (noise > 0 and math.isfinite(mean)):
        return Estimate(mean, n)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * noise
    tails = (float(tail(mean / noise)) for tail in (stats.norm.sf, stats.norm.cdf))
    return Estimate(mean, n, math.nan, mean - half, mean + half, *tails)


def holm(p: Sequence[float]) -> list[float]:
    """p-values after Holm's step-down adjustment (1979), which controls the family-wise error rate."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * np.asarray(p)[order]).clip(max=1)
    return adjusted.tolist()
