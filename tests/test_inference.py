"""Intervals and tests against hand-worked numbers, power tables and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from gradexp.report.inference import BOOTSTRAP_FROM, estimate, estimate_over_images, holm


def test_holm_by_hand() -> None:
    """Sorted .005, .01, .03, .04, times 4, 3, 2, 1, and never falling: .02, .03, .06, .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_error() -> None:
    """Six true hypotheses: at least one is rejected in 5 % of families at most, and in more than that without Holm."""
    families = np.random.default_rng(0).uniform(size=(4000, 6))
    wrong = np.mean([min(holm(family)) < 0.05 for family in families.tolist()])
    assert wrong < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    assert np.mean(families.min(1) < 0.05) > 0.2


@pytest.mark.parametrize("n", [2, 3, 5, BOOTSTRAP_FROM, 12])
def test_intervals_cover(n: int) -> None:
    """A 95 % interval holds the true mean of normal differences in about 95 % of experiments, from two seeds on."""
    draws = np.random.default_rng(n).normal(1.0, 2.0, (600, n))
    found = [estimate(d, confidence=0.95, resamples=500) for d in draws.tolist()]
    covered = np.mean([e.low < 1.0 < e.high for e in found])
    assert 0.92 < covered < 0.98


def test_the_bootstrap_follows_skewed_differences() -> None:
    """Covers an exponential's mean about as Student's does; the interval is longer on the side of the long tail."""
    draws = np.random.default_rng(1).exponential(1.0, (400, 12))
    found = [estimate(d, confidence=0.95, resamples=500) for d in draws.tolist()]
    assert np.mean([e.low < 1.0 < e.high for e in found]) > 0.87
    assert np.mean([(e.high - e.mean) - (e.mean - e.low) for e in found]) > 0.05


def test_below_six_seeds_no_bootstrap_can_cover() -> None:
    """A resampled mean stays within the sample, which all lies on one side of the median in 2^(1-n) of samples."""
    assert 1 - 2 ** (1 - (BOOTSTRAP_FROM - 1)) < 0.95 < 1 - 2 ** (1 - BOOTSTRAP_FROM)


def test_p_values_are_those_of_a_paired_t_test() -> None:
    left, right = [63.1, 62.4, 64.0], [61.0, 61.9, 61.5]
    e = estimate(np.subtract(left, right).tolist(), confidence=0.95, resamples=99)
    assert e.p_for == pytest.approx(stats.ttest_rel(left, right, alternative="greater").pvalue)
    assert e.p_against == pytest.approx(1 - e.p_for)


@pytest.mark.parametrize("differences", [[2.0], [1.5, 1.5, 1.5], [math.inf, 1.0], [math.nan, 1.0]])
def test_nothing_is_tested_without_a_spread(differences: list[float]) -> None:
    e = estimate(differences, confidence=0.95, resamples=99)
    assert all(map(math.isnan, (e.p_for, e.p_against, e.low, e.high)))


def test_over_images_is_a_z_test_of_the_means() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.29, 0.2, 5000), rng.normal(0.28, 0.3, 5000)
    noise = math.hypot(a.std(ddof=1), b.std(ddof=1)) / math.sqrt(5000)
    e = estimate_over_images(a.mean() - b.mean(), noise, len(a), 0.95)
    reference = stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert e.p_for == pytest.approx(reference.pvalue, rel=2e-2)
    assert (e.low, e.high) == pytest.approx((interval.low, interval.high), rel=1e-2)
    assert math.isnan(estimate_over_images(0.1, math.nan, 9, 0.95).p_for)
