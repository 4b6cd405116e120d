"""A confidence means what it says, and the threshold parts known from unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from index.calibration import CANDIDATES, Calibration, Familiarity, background, fit_calibration

MADE_BY = Calibration(
    slope=12.0, none_offset=2.0, none_slope=9.0, abstain_below=0.5, queries=1, correct=1, unknown=0
)  # fmt: skip
NOTHING = np.zeros(2, np.float32)
FAMILIAR = replace(MADE_BY, familiarity=Familiarity(offset=-1.0, best=8.0, background=-4.0, direction=(1.0, 2.0)))


def _made(count: int, made_by: Calibration = MADE_BY) -> tuple[Any, Any]:
    """Falling scores, and which of them is right (or none) drawn with the probabilities of a calibration."""
    rng = np.random.default_rng(0)
    scores_NK = -np.sort(-rng.uniform(0.2, 0.9, (count, 1)) * rng.uniform(0.3, 1, (count, CANDIDATES)), axis=1)
    probabilities = np.array([made_by.confidences(row.tolist(), background(row.tolist())) for row in scores_NK])
    drawn_N1 = rng.uniform(size=(count, 1))
    upto_NK = np.cumsum(probabilities, axis=1)
    right_NK = (drawn_N1 < upto_NK) & (drawn_N1 >= upto_NK - probabilities)
    return scores_NK, right_NK


def _fit(scores_NK: Any, right_NK: Any, known_N: Any = None) -> Calibration:
    """Fit where a query's embedding says nothing."""
    known_N = np.ones(len(scores_NK), bool) if known_N is None else known_N
    embeddings_ND = np.zeros((len(scores_NK), 2), np.float32)
    return fit_calibration(scores_NK, right_NK, known_N, _without(scores_NK, right_NK), embeddings_ND)


def _without(scores_NK: Any, right_NK: Any) -> Any:
    return -np.sort(-np.where(right_NK, np.nan, scores_NK), axis=1)  # numpy sorts NaN last


def test_the_parameters_that_made_the_data_are_found() -> None:
    scores_NK, right_NK = _made(20_000)
    fitted = _fit(scores_NK, right_NK)
    assert fitted.slope == pytest.approx(MADE_BY.slope, rel=0.05)
    assert fitted.none_offset == pytest.approx(MADE_BY.none_offset, abs=0.25)
    assert fitted.none_slope == pytest.approx(MADE_BY.none_slope, rel=0.1)
    confidences = np.array([fitted.confidences(row.tolist(), background(row.tolist())) for row in scores_NK])
    for rank in range(3):  # of predictions of confidence 0.7, seven in ten are right, at every rank
        for low in np.arange(0, 1, 0.1):
            inside = (confidences[:, rank] >= low) & (confidences[:, rank] < low + 0.1)
            if inside.sum() > 300:
                found = right_NK[inside, rank].mean()
                assert found == pytest.approx(confidences[inside, rank].mean(), abs=0.05)


def test_it_is_the_best_fit_of_all_around_it() -> None:
    scores_NK, right_NK = _made(400)
    fitted = _fit(scores_NK, right_NK)

    def loss(**changed: float) -> float:
        other = replace(fitted, **changed)
        total = 0.0
        for row, right in zip(scores_NK.tolist(), right_NK, strict=True):
            confidences = other.confidences(row, background(row))
            total -= np.log(confidences[int(right.argmax())] if right.any() else 1 - sum(confidences))
        return total

    for name in ("slope", "none_offset", "none_slope"):
        value = getattr(fitted, name)
        assert all(loss(**{name: value + change}) > loss() for change in (-0.3, 0.3))


def test_the_threshold_is_the_best_of_all_by_trying_each() -> None:
    scores_NK, right_NK = _made(300)
    known_N = right_NK.any(axis=1)
    fitted = _fit(scores_NK, right_NK, known_N)
    without_NK = _without(scores_NK, right_NK)[known_N]
    asked = [*scores_NK.tolist(), *([s for s in row if not np.isnan(s)] for row in without_NK.tolist())]
    values = np.array([fitted.known(row, background(row), NOTHING) for row in asked])
    known = np.concatenate([known_N, np.zeros(len(without_NK), bool)])

    def youden(answered: Any) -> float:
        return float(answered[known].mean() - answered[~known].mean())

    answered = np.array([not fitted.abstains(value) for value in values])
    assert youden(answered) == pytest.approx(max(youden(values >= cut) for cut in values))


def test_perfectly_parted_scores_stay_finite() -> None:
    scores_NK = np.full((20, CANDIDATES), 0.2)
    scores_NK[:, 0] = np.concatenate([np.linspace(0.21, 0.4, 10), np.linspace(0.6, 0.9, 10)])
    right_NK = np.zeros((20, CANDIDATES), bool)
    right_NK[10:, 0] = True
    fitted = _fit(scores_NK, right_NK)
    assert np.isfinite([fitted.slope, fitted.none_offset, fitted.none_slope]).all()
    sure = [fitted.confidences(row, background(row))[0] for row in scores_NK.tolist()]
    assert max(sure[:10]) < 0.5 < min(sure[10:])


def test_confidences_fall_with_the_score_and_never_overflow() -> None:
    steep = replace(MADE_BY, slope=1e6)
    assert steep.confidences([1.0, 0.5, -1.0], 0.5) == [1.0, 0.0, 0.0]
    confidences = MADE_BY.confidences([0.9, 0.7, 0.7, 0.1], 0.5)
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(MADE_BY.known([0.9, 0.7, 0.7, 0.1], 0.5, NOTHING))
    assert sum(MADE_BY.confidences([0.9] * 40, 0.9)[:CANDIDATES]) < 1


def test_a_near_twin_and_a_high_background_lower_the_confidence() -> None:
    alone, twin = ([0.8, second, 0.3] for second in (0.3, 0.79))
    assert MADE_BY.confidences(twin, 0.3)[0] < MADE_BY.confidences(alone, 0.3)[0]
    assert MADE_BY.confidences(alone, 0.7)[0] < MADE_BY.confidences(alone, 0.3)[0]


def test_without_a_prediction_nothing_is_known() -> None:
    assert MADE_BY.confidences([], background([])) == []
    for calibration in (MADE_BY, FAMILIAR):
        assert calibration.known([], background([]), NOTHING) == 0.0


def test_it_survives_json() -> None:
    for calibration in (MADE_BY, FAMILIAR):
        assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_an_older_form_is_still_read() -> None:
    """It had nothing of its own for what is known."""
    content = FAMILIAR.to_dict()
    del content["familiarity"]
    assert Calibration.from_dict(content) == MADE_BY


def test_known_is_a_sigmoid_of_scores_and_embedding() -> None:
    logit = -1.0 + 8.0 * 0.7 - 4.0 * 0.3 + (0.6 * 1.0 + 0.8 * 2.0)
    known = FAMILIAR.known([0.7, 0.4], 0.3, np.array([0.6, 0.8], np.float32))
    assert known == pytest.approx(1 / (1 + np.exp(-logit)))
    assert FAMILIAR.confidences([0.7, 0.4], 0.3) == MADE_BY.confidences([0.7, 0.4], 0.3)
    assert FAMILIAR.known([1e6], 0.0, NOTHING) == 1.0
    assert FAMILIAR.known([-1e6], 0.0, NOTHING) == 0.0


def _with_hard_ones(count: int, seed: int) -> tuple[Any, Any, Any, Any]:
    """Scores, which is right, scores without it, embeddings: the further along the first dimension, the less a query
    scores, known or not."""
    rng = np.random.default_rng(seed)
    hard_N = rng.uniform(0, 0.4, count)
    scores_NK = np.tile(np.linspace(0.3, 0.2, CANDIDATES), (count, 1))
    scores_NK[:, 0] = 0.8 - hard_N + rng.normal(0, 0.05, count)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:, 0] = rng.uniform(size=count) < 0.8
    without_NK = scores_NK.copy()
    without_NK[:, 0] = 0.65 - hard_N + rng.normal(0, 0.05, count)
    embeddings_ND = np.stack([hard_N, rng.normal(0, 0.2, count)], axis=1).astype(np.float32)
    return scores_NK, right_NK, without_NK, embeddings_ND


def test_known_learns_which_queries_score_less() -> None:
    scores_NK, right_NK, without_NK, embeddings_ND = _with_hard_ones(2000, seed=1)
    known_N = np.arange(2000) >= 100  # a hundred are given that the catalog does not have
    scores_NK[~known_N], right_NK[~known_N] = without_NK[~known_N], False
    fitted = fit_calibration(scores_NK, right_NK, known_N, without_NK, embeddings_ND)
    familiarity = fitted.familiarity
    assert familiarity is not None
    hard, other = familiarity.direction
    assert hard == pytest.approx(familiarity.best, rel=0.15)  # what it costs in score is given back
    assert abs(other) < 0.1 * hard
    scores_NK, _, without_NK, embeddings_ND = _with_hard_ones(500, seed=2)
    wrong = 0
    for scores, without, embedding in zip(scores_NK.tolist(), without_NK.tolist(), embeddings_ND, strict=True):
        wrong += fitted.abstains(fitted.known(scores, background(scores), embedding))
        wrong += not fitted.abstains(fitted.known(without, background(without), embedding))
    assert wrong / 1000 < 0.12  # 0.067 by the deviations; by the best score alone one in three


def test_the_weights_of_known_are_the_best_of_all_around_them() -> None:
    scores_NK, right_NK, without_NK, embeddings_ND = _with_hard_ones(400, seed=3)
    fitted = fit_calibration(scores_NK, right_NK, np.ones(400, bool), without_NK, embeddings_ND)
    familiarity = fitted.familiarity
    assert familiarity is not None
    asked = np.concatenate([scores_NK, without_NK])
    features_NF = np.column_stack([asked[:, 0], asked[:, 1:].mean(axis=1), np.tile(embeddings_ND, (2, 1))])
    deviation_F = features_NF.std(axis=0)
    known_N = np.arange(800) < 400

    def loss(offset: float, weights_F: Any) -> float:
        logit_N = offset + features_NF @ weights_F
        ridge = weights_F * deviation_F
        fit = np.log1p(np.exp(np.where(known_N, -logit_N, logit_N))).sum()
        return float(fit + 0.5 * (ridge[:2] @ ridge[:2] + 0.2 * ridge[2:] @ ridge[2:]))

    weights_F = np.array([familiarity.best, familiarity.background, *familiarity.direction])
    least = loss(familiarity.offset, weights_F)
    for place in (0, 2, 3):  # all backgrounds are alike
        change_F = np.zeros(4)
        change_F[place] = 0.05
        for sign in (-1, 1):
            offset = familiarity.offset - sign * change_F @ features_NF.mean(axis=0)
            assert loss(offset, weights_F + sign * change_F) > least
    assert all(loss(familiarity.offset + change, weights_F) > least for change in (-0.05, 0.05))


def test_a_catalog_of_one_entity_has_nothing_to_tell_it_from() -> None:
    scores_NK = np.full((20, CANDIDATES), np.nan)
    scores_NK[:, 0] = np.linspace(0.5, 0.9, 20)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:, 0] = True
    fitted = _fit(scores_NK, right_NK)
    assert fitted.familiarity is None
    assert not fitted.abstains(fitted.known([0.8], background([0.8]), NOTHING))


def test_the_first_form_is_still_read() -> None:
    old = {"a": 10.0, "b": -5.0, "abstain_below": 0.6, "queries": 20, "correct": 10}
    calibration = Calibration.from_dict(old)
    sigmoid = pytest.approx(1 / (1 + np.exp(-(10 * 0.7 - 5))))
    assert calibration.known([0.7, 0.69], 0.2, NOTHING) == sigmoid
    assert calibration.confidences([0.7, 0.69], 0.2)[0] == sigmoid
    assert (calibration.abstain_below, calibration.unknown) == (0.6, 0)


@pytest.mark.parametrize(
    ("correct", "reason"),
    [
        (np.zeros(50, bool), "the 50 validation queries gave 0"),
        (np.arange(6) > 2, "the 6 validation queries gave 3"),
        (np.zeros(0, bool), "the 0 validation queries gave 0"),
    ],
)
def test_too_few_right_ones_cannot_be_fitted(correct: Any, reason: str) -> None:
    right_NK = np.zeros((len(correct), CANDIDATES), bool)
    right_NK[:, 0] = correct
    with pytest.raises(UserError, match=reason):
        _fit(np.linspace(0.9, 0.1, len(correct) * CANDIDATES).reshape(right_NK.shape), right_NK)


@pytest.mark.parametrize("wrong", [0, 4])
def test_where_hardly_one_is_wrong_those_left_out_show_how_wrong_ones_score(wrong: int) -> None:
    """Twenty queries, as of a small catalog: the right entity at 0.8 to 0.9, all others at 0.3 and less."""
    scores_NK = np.tile(np.linspace(0.3, 0.1, CANDIDATES), (20, 1))
    scores_NK[:, 0] = np.linspace(0.8, 0.9, 20)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[wrong:, 0] = True
    scores_NK[:wrong, 0] = 0.35
    fitted = _fit(scores_NK, right_NK)
    assert (fitted.queries, fitted.correct, fitted.unknown) == (20, 20 - wrong, 20)
    known = [fitted.known(row, background(row), NOTHING) for row in scores_NK.tolist()]
    assert min(known[wrong:]) > 0.9
    stranger = scores_NK[-1, 1:].tolist()
    assert fitted.known(stranger, background(stranger), NOTHING) < 0.1
    assert fitted.abstains(fitted.known(stranger, background(stranger), NOTHING))
    assert not any(map(fitted.abstains, known[wrong:]))


def test_scores_that_say_nothing_cannot_be_fitted() -> None:
    """The right entity always stands last but for a few."""
    scores_NK = np.tile(np.linspace(0.9, 0.1, CANDIDATES), (60, 1))
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:5, 0] = right_NK[5:, -1] = True
    with pytest.raises(UserError, match="no higher than wrong ones"):
        _fit(scores_NK, right_NK)
