"""Intervals and calibration figures against slow, obvious versions of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics import (
    auroc,
    auroc_interval,
    calibration_error,
    harmonic_mean_interval,
    reliability,
    share_interval,
)


def test_an_interval_is_that_of_resampling_the_queries() -> None:
    hits = np.arange(80) < 30
    rng = np.random.default_rng(1)
    means = [100 * rng.choice(hits, 80).mean() for _ in range(4000)]
    assert share_interval(30, 80) == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=1.3)
    assert share_interval(30, 80) == share_interval(30, 80)


def test_the_interval_of_a_certain_share_is_a_point() -> None:
    assert share_interval(0, 10) == (0.0, 0.0)
    assert harmonic_mean_interval((10, 10), (5, 5)) == (100.0, 100.0)
    assert harmonic_mean_interval((0, 10), (0, 5)) == (0.0, 0.0)


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
