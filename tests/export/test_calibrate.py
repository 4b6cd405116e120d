"""Fitting a calibration: confidences are probabilities, and the threshold separates known from unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from core.errors import UserError
from export.calibrate import add_open_set_model, fit_softmax
from export.queries import LabelledSearch
from index.calibration import CANDIDATES, Calibration, background

TRUTH = Calibration(slope=12.0, none_offset=2.0, none_slope=9.0, abstain_below=0.5, queries=1, correct=1, unknown=0)
NO_EMBEDDING = np.zeros(2, np.float32)


def _draw(count: int) -> tuple[Any, Any]:
    """Return falling scores, and which of them is right (or none), drawn with the probabilities of `TRUTH`."""
    rng = np.random.default_rng(0)
    scores_NK = -np.sort(-rng.uniform(0.2, 0.9, (count, 1)) * rng.uniform(0.3, 1, (count, CANDIDATES)), axis=1)
    probabilities = np.array(
        [TRUTH.judge(row.tolist(), background(row.tolist()), NO_EMBEDDING)[0] for row in scores_NK]
    )
    drawn_N1 = rng.uniform(size=(count, 1))
    upto_NK = np.cumsum(probabilities, axis=1)
    right_NK = (drawn_N1 < upto_NK) & (drawn_N1 >= upto_NK - probabilities)
    return scores_NK, right_NK


def _searched(scores_NK: Any, right_NK: Any, in_catalog_N: Any = None, embeddings_ND: Any = None) -> LabelledSearch:
    """Return searches for ten entities each. An entity of the catalog that is not among them has row 99."""
    nothing_N1 = np.full((len(scores_NK), 1), -1)
    elsewhere_N = 99 if in_catalog_N is None else np.where(in_catalog_N, 99, -1)
    return LabelledSearch(
        own_N=np.where(right_NK.any(axis=1), right_NK.argmax(axis=1), elsewhere_N),
        group_N=np.arange(len(scores_NK)),
        rows_NF=np.concatenate([np.where(np.isnan(scores_NK), -1, np.arange(CANDIDATES)), nothing_N1], axis=1),
        scores_NF=np.concatenate([scores_NK, nothing_N1 * np.nan], axis=1),
        embeddings_ND=np.ones((len(scores_NK), 1), np.float32) if embeddings_ND is None else embeddings_ND,
    )


def _fit(scores_NK: Any, right_NK: Any, in_catalog_N: Any = None) -> Calibration:
    return fit_softmax(_searched(scores_NK, right_NK, in_catalog_N))


def _in_catalog(calibration: Calibration, scores: list[float]) -> float:
    return calibration.judge(scores, background(scores), NO_EMBEDDING)[1]


def test_the_true_parameters_are_found() -> None:
    scores_NK, right_NK = _draw(20_000)
    fitted = _fit(scores_NK, right_NK)
    assert fitted.slope == pytest.approx(TRUTH.slope, rel=0.05)
    assert fitted.none_offset == pytest.approx(TRUTH.none_offset, abs=0.25)
    assert fitted.none_slope == pytest.approx(TRUTH.none_slope, rel=0.1)
    confidences = np.array([fitted.judge(row.tolist(), background(row.tolist()), NO_EMBEDDING)[0] for row in scores_NK])
    for rank in range(3):  # of predictions of confidence 0.7, seven in ten are right, at every rank
        for low in np.arange(0, 1, 0.1):
            inside = (confidences[:, rank] >= low) & (confidences[:, rank] < low + 0.1)
            if inside.sum() > 300:
                found = right_NK[inside, rank].mean()
                assert found == pytest.approx(confidences[inside, rank].mean(), abs=0.05)


def test_no_parameters_nearby_fit_better() -> None:
    scores_NK, right_NK = _draw(400)
    fitted = _fit(scores_NK, right_NK)

    def loss(**changed: float) -> float:
        other = Calibration(**{**fitted.to_dict(), **changed})
        total = 0.0
        for row, right in zip(scores_NK.tolist(), right_NK, strict=True):
            confidences = other.judge(row, background(row), NO_EMBEDDING)[0]
            total -= np.log(confidences[int(right.argmax())] if right.any() else 1 - _in_catalog(other, row))
        return total

    for name in ("slope", "none_offset", "none_slope"):
        value = getattr(fitted, name)
        assert all(loss(**{name: value + change}) > loss() for change in (-0.3, -1e-3, 1e-3, 0.3))


def test_the_threshold_is_the_best_of_all_cuts() -> None:
    scores_NK, right_NK = _draw(300)
    in_catalog_N = right_NK.any(axis=1)
    fitted = _fit(scores_NK, right_NK, in_catalog_N)
    without_NK = -np.sort(-np.where(right_NK, np.nan, scores_NK), axis=1)[in_catalog_N]
    searched = [*scores_NK.tolist(), *([s for s in row if not np.isnan(s)] for row in without_NK.tolist())]
    values = np.array([_in_catalog(fitted, row) for row in searched])
    positive = np.concatenate([in_catalog_N, np.zeros(len(without_NK), bool)])

    def youden(answered: Any) -> float:
        return float(answered[positive].mean() - answered[~positive].mean())

    answered = np.array([not fitted.abstains(value) for value in values])
    assert youden(answered) == pytest.approx(max(youden(values >= cut) for cut in values))


def test_perfectly_separated_scores_stay_finite() -> None:
    scores_NK = np.full((20, CANDIDATES), 0.2)
    scores_NK[:, 0] = np.concatenate([np.linspace(0.21, 0.4, 10), np.linspace(0.6, 0.9, 10)])
    right_NK = np.zeros((20, CANDIDATES), bool)
    right_NK[10:, 0] = True
    fitted = _fit(scores_NK, right_NK)
    assert np.isfinite([fitted.slope, fitted.none_offset, fitted.none_slope]).all()
    confidences = [fitted.judge(row, background(row), NO_EMBEDDING)[0][0] for row in scores_NK.tolist()]
    assert max(confidences[:10]) < 0.5 < min(confidences[10:])


def _search(count: int, in_catalog_N: Any, seed: int) -> LabelledSearch:
    """Return searches that find the entity first, if the catalog has it. Without it, known queries score as unknown."""
    rng = np.random.default_rng(seed)
    embeddings_ND = rng.normal(size=(count, 4))
    embeddings_ND /= np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    scores_NF = np.tile(np.linspace(0.3, 0.2, CANDIDATES + 1), (count, 1))
    without_N = 0.55 - 0.2 * embeddings_ND[:, 0] + rng.normal(0, 0.05, count)
    scores_NF[:, 0] = np.where(in_catalog_N, without_N + 0.2, without_N)
    scores_NF[in_catalog_N, 1] = without_N[in_catalog_N]
    return LabelledSearch(
        own_N=np.where(in_catalog_N, 0, -1),
        group_N=np.arange(count),
        rows_NF=np.tile(np.arange(CANDIDATES + 1), (count, 1)),
        scores_NF=scores_NF,
        embeddings_ND=embeddings_ND.astype(np.float32),
    )


def _outliers(count: int, score: float) -> LabelledSearch:
    nowhere_ND = np.tile(np.eye(4, dtype=np.float32)[3], (count, 1))
    none_NK = np.zeros((count, CANDIDATES), bool)
    return _searched(np.full((count, CANDIDATES), score), none_NK, np.zeros(count, bool), nowhere_ND)


def test_the_open_set_model_learns_from_queries_left_out_ones_and_outliers() -> None:
    queries, outliers = _search(600, np.arange(600) >= 60, seed=1), _outliers(60, 0.7)
    plain = fit_softmax(queries)
    fitted = add_open_set_model(plain, queries, outliers)
    assert replace(fitted, open_set_model=None, abstain_below=plain.abstain_below) == plain

    def abstains(scores_NK: Any, embeddings_ND: Any) -> Any:
        searched = zip(scores_NK.tolist(), embeddings_ND, strict=True)
        return np.array([fitted.abstains(fitted.judge(row, background(row), each_D)[1]) for row, each_D in searched])

    others = _search(500, np.ones(500, bool), seed=2)
    wrong = abstains(others.scores, others.embeddings_ND).mean()
    wrong += 1 - abstains(others.scores_without, others.embeddings_ND).mean()
    assert wrong / 2 < 0.1  # 0.023 is the least possible with this noise, without outliers
    known_at_07 = np.abs(others.scores[:, 0] - 0.7) < 0.05
    assert abstains(outliers.scores, outliers.embeddings_ND).all()
    assert abstains(others.scores[known_at_07], others.embeddings_ND[known_at_07]).mean() < 0.2


def test_outliers_do_not_move_the_threshold() -> None:
    """The threshold is for queries. Outliers can outnumber those of a small validation file."""
    queries = _search(40, np.ones(40, bool), seed=3)
    fitted = add_open_set_model(fit_softmax(queries), queries, _outliers(64, -0.9))
    known, unknown = (
        np.array(
            [
                fitted.judge(row, background(row), each_D)[1]
                for row, each_D in zip(rows.tolist(), queries.embeddings_ND, strict=True)
            ]
        )
        for rows in (queries.scores, queries.scores_without)
    )

    def youden(cut: float) -> float:
        return float((known >= cut).mean() - (unknown >= cut).mean())

    assert youden(fitted.abstain_below) > max(youden(cut) for cut in known) - 0.1 > 0.4


def test_a_catalog_of_one_entity_has_no_open_set_model() -> None:
    scores_NK = np.full((20, CANDIDATES), np.nan)
    scores_NK[:, 0] = np.linspace(0.5, 0.9, 20)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:, 0] = True
    queries = _searched(scores_NK, right_NK)
    plain = fit_softmax(queries)
    assert add_open_set_model(plain, queries, queries) is plain
    assert not plain.abstains(_in_catalog(plain, [0.8]))


@pytest.mark.parametrize(
    ("correct", "reason"),
    [
        (np.zeros(50, bool), "the 50 queries gave 0"),
        (np.arange(6) > 2, "the 6 queries gave 3"),
        (np.zeros(0, bool), "the 0 queries gave 0"),
    ],
)
def test_too_few_right_answers_cannot_be_fitted(correct: Any, reason: str) -> None:
    right_NK = np.zeros((len(correct), CANDIDATES), bool)
    right_NK[:, 0] = correct
    with pytest.raises(UserError, match=reason):
        _fit(np.linspace(0.9, 0.1, len(correct) * CANDIDATES).reshape(right_NK.shape), right_NK)


@pytest.mark.parametrize("wrong", [0, 4])
def test_with_few_wrong_answers_left_out_queries_show_how_wrong_ones_score(wrong: int) -> None:
    """Twenty queries of a small catalog: the right entity scores 0.8 to 0.9, all others at most 0.3."""
    scores_NK = np.tile(np.linspace(0.3, 0.1, CANDIDATES), (20, 1))
    scores_NK[:, 0] = np.linspace(0.8, 0.9, 20)
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[wrong:, 0] = True
    scores_NK[:wrong, 0] = 0.35
    fitted = _fit(scores_NK, right_NK)
    assert (fitted.queries, fitted.correct, fitted.unknown) == (20, 20 - wrong, 20)
    known = [_in_catalog(fitted, row) for row in scores_NK.tolist()]
    assert min(known[wrong:]) > 0.9
    stranger = _in_catalog(fitted, scores_NK[-1, 1:].tolist())
    assert stranger < 0.1
    assert fitted.abstains(stranger)
    assert not any(map(fitted.abstains, known[wrong:]))


def test_uninformative_scores_cannot_be_fitted() -> None:
    scores_NK = np.tile(np.linspace(0.9, 0.1, CANDIDATES), (60, 1))
    right_NK = np.zeros(scores_NK.shape, bool)
    right_NK[:5, 0] = right_NK[5:, -1] = True  # mostly the lowest score is the right one
    with pytest.raises(UserError, match="no higher than wrong ones"):
        _fit(scores_NK, right_NK)
