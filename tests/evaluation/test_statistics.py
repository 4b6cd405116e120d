"""Intervals and calibration figures against slow, obvious versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics import (
    auroc,
    auroc_interval,
    calibration_error,
    harmonic_mean_interval,
    ratio_interval,
    reliability,
    share_interval,
)


def test_the_bounds_are_the_shares_that_are_just_compatible() -> None:
    """Wilson's definition: the observed share is 1.96 standard errors from either bound."""
    bounds = np.array(share_interval(30, 80)) / 100
    np.testing.assert_allclose(30 / 80 - bounds, 1.96 * np.sqrt(bounds * (1 - bounds) / 80) * [1, -1], rtol=1e-4)


def test_the_interval_of_a_certain_share_is_not_a_point() -> None:
    """Wilson's bounds for all of n queries: n / (n + z squared) and 1."""
    assert share_interval(60, 60) == pytest.approx((100 * 60 / (60 + 1.96**2), 100.0), abs=0.01)
    assert share_interval(0, 60) == pytest.approx((0.0, 100 * 1.96**2 / (60 + 1.96**2)), abs=0.01)
    low, high = harmonic_mean_interval((60, 60), (50, 50))
    assert 93 < low < 98 < high <= 100


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 9, 40), rng.integers(0, 7, 30)
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert auroc(positive, negative) == pytest.approx(np.mean(wins))
    low, high = auroc_interval(positive.tolist(), negative.tolist())
    assert low < auroc(positive, negative) < high


def test_calibration_error_by_hand() -> None:
    bins = reliability([0.95, 0.96, 0.1, 1.0], [True, False, False, True])
    assert [each.count for each in bins] == [1, 3]
    assert calibration_error(bins) == pytest.approx((1 * 0.1 + 3 * abs(0.97 - 2 / 3)) / 4)
    assert calibration_error(reliability([1.0, 0.0], [True, False])) == 0.0


def test_a_ratio_is_paired_and_resamples_whole_groups() -> None:
    rng = np.random.default_rng(0)
    other_N = rng.random(400) < 0.5
    right_N = other_N | (rng.random(400) < 0.2)
    group_N = np.arange(400)
    assert ratio_interval(other_N, other_N, group_N) == (1.0, 1.0)
    interval = ratio_interval(right_N, other_N, group_N)
    ratio = right_N.sum() / other_N.sum()
    spread = 1.96 * np.std(right_N - ratio * other_N) / other_N.mean() / 20  # the delta method, over 400 queries
    assert interval == pytest.approx((ratio - spread, ratio + spread), abs=0.02)
    repeated = [np.repeat(each_N, 9) for each_N in (right_N, other_N, group_N)]
    assert ratio_interval(*repeated) == pytest.approx(interval)  # more queries of the same entities say no more
    assert ratio_interval(right_N, np.zeros(400), group_N) is None
