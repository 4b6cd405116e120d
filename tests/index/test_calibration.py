"""A confidence means what it says, and the threshold parts known from unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from index.calibration import CANDIDATES, Asked, Calibration, background, fit_calibration, with_familiarity
from index.familiarity import Familiarity

MADE_BY = Calibration(
    slope=12.0, none_offset=2.0, none_slope=9.0, abstain_below=0.5, queries=1, correct=1, unknown=0
)  # fmt: skip
NOTHING = np.zeros(2, np.float32)
FAMILIAR = replace(
    MADE_BY,
    familiarity=Familiarity(
        offset=-1.0, best=8.0, background=-4.0, width=1.0,
        landmarks_LD=np.eye(2, dtype=np.float32), level_L=np.array([1.0, 2.0]), slope_L=np.array([0.0, 0.5]),
    ),
)  # fmt: skip


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
    without_NK = np.where(right_NK, np.nan, scores_NK)
    without_NK = -np.sort(-without_NK, axis=1)  # numpy sorts NaN last
    return fit_calibration(
        scores_NK, right_NK, np.ones(len(scores_NK), bool) if known_N is None else known_N, without_NK
    )


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
        other = Calibration(**{**fitted.to_dict(), **changed})
        total = 0.0
        for row, right in zip(scores_NK.tolist(), right_NK, strict=True):
            confidences = other.confidences(row, background(row))
            total -= np.log(
                confidences[int(right.argmax())] if right.any() else 1 - other.known(row, background(row), NOTHING)
            )
        return total

    for name in ("slope", "none_offset", "none_slope"):
        value = getattr(fitted, name)
        assert all(loss(**{name: value + change}) > loss() for change in (-0.3, 0.3))


def test_the_threshold_is_the_best_of_all_by_trying_each() -> None:
    scores_NK, right_NK = _made(300)
    known_N = right_NK.any(axis=1)
    fitted = _fit(scores_NK, right_NK, known_N)
    without_NK = -np.sort(-np.where(right_NK, np.nan, scores_NK), axis=1)[known_N]
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
    steep = Calibration(**{**MADE_BY.to_dict(), "slope": 1e6})
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
    assert Calibration.from_dict(json.loads(json.dumps(MADE_BY.to_dict()))) == MADE_BY


def test_what_is_known_is_judged_apart_where_there_is_what_judges_it() -> None:
    embedding_D = np.array([0.6, 0.8], np.float32)
    assert FAMILIAR.familiarity is not None
    confidences, known = FAMILIAR.judge([0.7, 0.4], 0.3, embedding_D)
    assert known == FAMILIAR.familiarity.known(0.7, 0.3, embedding_D) != MADE_BY.known([0.7, 0.4], 0.3, embedding_D)
    assert confidences == MADE_BY.confidences([0.7, 0.4], 0.3)
    assert Calibration.from_dict(FAMILIAR.to_dict(), FAMILIAR.familiarity) == FAMILIAR


def _asked(count: int, known_N: Any, seed: int) -> tuple[Asked, Any, Any]:
    """Queries, which of their best is right, and their scores without it. Unknown ones score as left out ones."""
    rng = np.random.default_rng(seed)
    embeddings_ND = rng.normal(size=(count, 4))
    embeddings_ND /= np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    scores_NK = np.tile(np.linspace(0.3, 0.2, CANDIDATES), (count, 1))
    without_NK = scores_NK.copy()
    without_NK[:, 0] = 0.55 - 0.2 * embeddings_ND[:, 0] + rng.normal(0, 0.05, count)
    scores_NK[:, 0] = np.where(known_N, without_NK[:, 0] + 0.2, without_NK[:, 0])
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:, 0] = known_N & (rng.random(count) < 0.8)
    return Asked(scores_NK=scores_NK, embeddings_ND=embeddings_ND.astype(np.float32)), right_NK, without_NK


def test_known_is_fitted_to_queries_left_out_ones_and_outliers() -> None:
    known_N = np.arange(600) >= 60  # sixty are given that the catalog does not have
    queries, right_NK, without_NK = _asked(600, known_N, seed=1)
    plain = fit_calibration(queries.scores_NK, right_NK, known_N, without_NK)
    nowhere_ND = np.tile(np.array([0.0, 0.0, 0.0, 1.0], np.float32), (60, 1))
    outliers = Asked(scores_NK=np.full((60, CANDIDATES), 0.7), embeddings_ND=nowhere_ND)
    fitted = with_familiarity(plain, queries, known_N, without_NK, np.arange(600), outliers)
    assert replace(fitted, familiarity=None, abstain_below=plain.abstain_below) == plain

    def abstains(scores_NK: Any, embeddings_ND: Any) -> Any:
        asked = zip(scores_NK.tolist(), embeddings_ND, strict=True)
        return np.array([fitted.abstains(fitted.known(row, background(row), each_D)) for row, each_D in asked])

    others, _, others_without_NK = _asked(500, np.ones(500, bool), seed=2)
    wrong = abstains(others.scores_NK, others.embeddings_ND).mean()
    wrong += 1 - abstains(others_without_NK, others.embeddings_ND).mean()
    assert wrong / 2 < 0.1  # 0.023 by the deviations, without outliers among them
    known_at_07 = np.abs(others.scores_NK[:, 0] - 0.7) < 0.05
    assert abstains(outliers.scores_NK, outliers.embeddings_ND).all()
    assert abstains(others.scores_NK[known_at_07], others.embeddings_ND[known_at_07]).mean() < 0.2


def test_outliers_do_not_move_the_threshold_of_what_is_asked() -> None:
    """It parts known queries from unknown ones; outliers are few beside those of a large file, many of a small one."""
    queries, right_NK, without_NK = _asked(40, np.ones(40, bool), seed=3)
    plain = fit_calibration(queries.scores_NK, right_NK, np.ones(40, bool), without_NK)
    outliers = Asked(scores_NK=np.full((64, CANDIDATES), -0.9), embeddings_ND=np.tile(np.eye(4)[3], (64, 1)))
    outliers = replace(outliers, embeddings_ND=outliers.embeddings_ND.astype(np.float32))
    fitted = with_familiarity(plain, queries, np.ones(40, bool), without_NK, np.arange(40), outliers)
    known, unknown = (
        np.array([fitted.known(row, background(row), each_D) for row, each_D in zip(rows, embeddings, strict=True)])
        for rows, embeddings in ((some.tolist(), queries.embeddings_ND) for some in (queries.scores_NK, without_NK))
    )

    def youden(cut: float) -> float:
        return float((known >= cut).mean() - (unknown >= cut).mean())

    assert youden(fitted.abstain_below) > max(youden(cut) for cut in known) - 0.1 > 0.4


def test_a_catalog_of_one_entity_has_nothing_to_tell_it_from() -> None:
    scores_NK = np.full((20, CANDIDATES), np.nan)
    scores_NK[:, 0] = np.linspace(0.5, 0.9, 20)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:, 0] = True
    plain = _fit(scores_NK, right_NK)
    queries = Asked(scores_NK=scores_NK, embeddings_ND=np.ones((20, 1), np.float32))
    without_NK = np.full(scores_NK.shape, np.nan)
    assert with_familiarity(plain, queries, np.ones(20, bool), without_NK, np.arange(20), queries) is plain
    assert not plain.abstains(plain.known([0.8], background([0.8]), NOTHING))


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
