"""A confidence means what it says, and the threshold parts right from wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from core.errors import UserError
from index.calibration import Calibration, fit_calibration


def test_the_slope_that_made_the_data_is_found() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 20_000)
    correct = rng.uniform(size=20_000) < 1 / (1 + np.exp(-(12 * scores - 7)))
    fitted = fit_calibration(scores, correct)
    assert fitted.a == pytest.approx(12, rel=0.05)
    assert fitted.b == pytest.approx(-7, rel=0.05)
    for low in np.arange(0, 1, 0.1):  # of answers of confidence 0.7, seven in ten are right
        confidences = np.array([fitted.confidence(score) for score in scores])
        inside = (confidences >= low) & (confidences < low + 0.1)
        assert correct[inside].mean() == pytest.approx(confidences[inside].mean(), abs=0.05)


def test_the_threshold_is_the_best_of_all_by_trying_each() -> None:
    rng = np.random.default_rng(3)
    correct = rng.uniform(size=300) < 0.7
    scores = rng.normal(np.where(correct, 0.6, 0.4), 0.12)
    fitted = fit_calibration(scores, correct)
    answered = np.array([not fitted.abstains(score) for score in scores])

    def youden(answered_N: np.ndarray) -> float:
        return float(answered_N[correct].mean() - answered_N[~correct].mean())

    assert youden(answered) == pytest.approx(max(youden(scores >= cut) for cut in scores))


def test_perfectly_parted_scores_stay_finite() -> None:
    scores = np.concatenate([np.linspace(0.1, 0.4, 10), np.linspace(0.6, 0.9, 10)])
    correct = np.arange(20) >= 10
    fitted = fit_calibration(scores, correct)
    assert np.isfinite([fitted.a, fitted.b]).all()
    assert [fitted.abstains(score) for score in scores] == (~correct).tolist()
    assert 0 < fitted.confidence(0.1) < 0.3
    assert 0.7 < fitted.confidence(0.9) < 1


def test_confidence_rises_and_never_overflows() -> None:
    calibration = Calibration(a=1e6, b=-5e5, abstain_below=0.5, queries=1, correct=1)
    assert calibration.confidence(-1.0) == 0.0
    assert calibration.confidence(0.5) == 0.5
    assert calibration.confidence(1.0) == 1.0


def test_it_survives_json() -> None:
    calibration = Calibration(a=1.25, b=-0.1, abstain_below=0.42, queries=10, correct=5)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("scores", "correct", "reason"),
    [
        (np.linspace(0, 1, 50), np.ones(50, bool), "gave 50 and 0"),
        (np.linspace(0, 1, 50), np.zeros(50, bool), "gave 0 and 50"),
        (np.linspace(0, 1, 6), np.arange(6) > 2, "gave 3 and 3"),
        (np.empty(0), np.empty(0, bool), "gave 0 and 0"),
        (np.linspace(0, 1, 50), np.arange(50) < 25, "no higher than wrong ones"),
        (np.full(50, 0.5), np.arange(50) < 25, "no higher than wrong ones"),
    ],
)
def test_what_cannot_be_fitted(scores: np.ndarray, correct: np.ndarray, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        fit_calibration(scores, correct)
