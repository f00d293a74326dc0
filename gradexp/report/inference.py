"""Intervals and tests for differences of a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

BOOTSTRAP_FROM = 6  # seeds: resampled means stay in [min, max], which 5 seeds cover with 93.75 % at best


@dataclass(frozen=True)
class Estimate:
    """A mean difference, positive where it goes as claimed, over n seeds; with its interval and one-sided p-values if any."""

    mean: float
    n: int
    std: float | None = None
    low: float | None = None
    high: float | None = None
    p_for: float | None = None
    p_against: float | None = None


def estimate(differences: Sequence[float], *, confidence: float, resamples: int) -> Estimate:
    """Mean of paired differences, one a seed: positive where they go as claimed.

    p-values are Student's. The interval is, from BOOTSTRAP_FROM seeds on, a percentile bootstrap of the mean at a level
    widened for few seeds (Hesterberg, 2015, "What teachers should know about the bootstrap", expanded percentile
    interval); below, Student's. One seed has neither, nor have seeds without spread, nor those of which one diverged:
    its differences are infinite, or NaN.
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


def estimate_over_images(mean: float, noise: float | None, confidence: float) -> Estimate:
    """A difference of means over the images of one model: the images are the sample, the model stays (normal theory).

    noise: its standard error, as if the two means were of different images. They are of the same ones, of which a record
    keeps the mean and the deviation only: cautious where an image that is hard for one method is hard for the other.
    """
    if not noise or not math.isfinite(mean):
        return Estimate(mean, 1)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * noise
    tails = (float(tail(mean / noise)) for tail in (stats.norm.sf, stats.norm.cdf))
    return Estimate(mean, 1, None, mean - half, mean + half, *tails)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): rejecting adjusted values below a level keeps the chance of any error below it."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted
