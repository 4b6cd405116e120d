"""Fit `index.levels.LevelModel` to searched queries, and to the same queries with their own entity left out.

A query whose entity is left out still has its types right. Such queries weigh as a fifth of all. Cross-validation over
the entities chooses the slope, and then an offset: the level chosen is the most specific of many, so it may be right
less often than its probability says. The offset lowers all probabilities until nine in ten of those chosen are right.

Shapes: N queries, K candidates, M levels of all queries, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.arrays import BoolArray, Float64Array, Int64Array
from export.queries import LabelledSearch
from index.calibration import CANDIDATES, Calibration, background
from index.levels import CERTAIN, LevelModel, SizedType, summed
from index.store import EntityStore

_SLOPES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)  # times that of the calibration
_MAX_QUERIES = 2048
_MIN_CHOSEN = 30  # queries with a level
_LEFT_OUT_WEIGHT = 0.25
_FOLDS = 5
_RIDGE = 1.0  # for features of mean 0 and deviation 1
_OFFSETS = np.arange(0.0, -4.0, -0.05)
_TINY = 1e-9
_NEWTON_STEPS = 50
_SEED = 7


@dataclass(frozen=True, kw_only=True)
class _Query:
    """A query, or one with its entity left out, with the candidates' scores and types, and the right types."""

    group: int
    weight: float
    scores: list[float]
    types: list[tuple[SizedType, ...]]
    right: frozenset[str | None]  # None: the best candidate is the query's entity


@dataclass(frozen=True, kw_only=True)
class _Levels:
    """Every level of every query, in the order in which a query's level is chosen: the most specific first."""

    features_MF: Float64Array
    right_M: BoolArray
    query_M: Int64Array
    group_M: Int64Array
    weight_M: Float64Array

    @classmethod
    def of(cls, queries: Sequence[_Query], slope: float) -> _Levels:
        features, right, numbers = [], [], []
        for number, query in enumerate(queries):
            background_ = background(query.scores)
            levels = summed(slope, query.scores, query.types)
            for level in sorted(levels, key=lambda each: (each.key is not None, each.size, -each.sum)):
                features.append(level.features(background_))
                right.append(level.key in query.right)
                numbers.append(number)
        query_M = np.array(numbers, np.int64)
        return cls(
            features_MF=np.array(features),
            right_M=np.array(right),
            query_M=query_M,
            group_M=np.array([each.group for each in queries])[query_M],
            weight_M=np.array([each.weight for each in queries])[query_M],
        )

    def take(self, chosen_M: BoolArray) -> _Levels:
        return _Levels(**{name: values[chosen_M] for name, values in vars(self).items()})


def add_level_model(calibration: Calibration, found: LabelledSearch, store: EntityStore) -> Calibration:
    """Add a level model, unless there are too few queries for one, or no level is right often enough."""
    queries = list(_queries(found, store))
    if len({each.group for each in queries}) < _FOLDS:
        return calibration
    fits = []
    for slope in (factor * calibration.slope for factor in _SLOPES):
        levels = _Levels.of(queries, slope)
        logit_M = _held_out_logits(levels)
        loss = float(levels.weight_M @ np.logaddexp(0.0, np.where(levels.right_M, -logit_M, logit_M)))
        fits.append((loss, slope, levels, logit_M))
    _, slope, levels, logit_M = min(fits, key=lambda each: each[0])
    offset = _offset(levels, logit_M)
    if offset is None:
        return calibration
    weights_F = _fit(levels)
    weights_F[0] += offset
    return replace(calibration, level=LevelModel(slope=slope, weights=tuple(weights_F.tolist())))


def _queries(found: LabelledSearch, store: EntityStore) -> Iterator[_Query]:
    query_N = np.flatnonzero(found.in_catalog)
    if len(query_N) > _MAX_QUERIES:
        query_N = np.sort(np.random.default_rng(_SEED).choice(query_N, _MAX_QUERIES, replace=False))
    needed = np.unique(np.append(found.rows_NF[query_N], found.own_N[query_N]))
    types = {each.row: store.type_levels.of(each.types) for each in store.by_rows(needed[needed >= 0].tolist())}
    for query in query_N:
        own = int(found.own_N[query])
        right_types = {key for key, _ in types[own]}
        rows_F, scores_F = found.rows_NF[query].tolist(), found.scores_NF[query].tolist()
        found_F = [(row, score) for row, score in zip(rows_F, scores_F, strict=True) if row >= 0]
        for left_out in (False, True):
            candidates = [each for each in found_F if not (left_out and each[0] == own)][:CANDIDATES]
            if candidates:
                yield _Query(
                    group=int(found.group_N[query]),
                    weight=_LEFT_OUT_WEIGHT if left_out else 1.0,
                    scores=[score for _, score in candidates],
                    types=[types[row] for row, _ in candidates],
                    right=frozenset({*right_types, *((None,) if candidates[0][0] == own else ())}),
                )


def _held_out_logits(levels: _Levels) -> Float64Array:
    """Return the logit of each level under a fit without its entity."""
    groups, group_M = np.unique(levels.group_M, return_inverse=True)
    fold_M = np.random.default_rng(_SEED).permutation(len(groups))[group_M] % _FOLDS
    logit_M = np.empty(len(fold_M))
    for fold in range(_FOLDS):
        out_M = fold_M == fold
        logit_M[out_M] = levels.features_MF[out_M] @ _fit(levels.take(~out_M))
    return logit_M


def _fit(levels: _Levels) -> Float64Array:
    """Return the weights `[F]` of a logistic regression with a ridge, by Newton's method. The first feature is 1."""
    mean_F, deviation_F = levels.features_MF.mean(axis=0), levels.features_MF.std(axis=0)
    mean_F[0], deviation_F[deviation_F < _TINY] = 0.0, 1.0
    standard_MF = (levels.features_MF - mean_F) / deviation_F
    ridge_F = np.full(len(mean_F), _RIDGE)
    ridge_F[0] = _TINY
    weights_F = np.zeros(len(mean_F))
    for _ in range(_NEWTON_STEPS):
        probability_M = 1.0 / (1.0 + np.exp(-np.clip(standard_MF @ weights_F, -30, 30)))
        curvature_M = levels.weight_M * probability_M * (1.0 - probability_M)
        gradient_F = (levels.weight_M * (probability_M - levels.right_M)) @ standard_MF + ridge_F * weights_F
        hessian_FF = (standard_MF * curvature_M[:, None]).T @ standard_MF + np.diag(ridge_F)
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        weights_F -= step_F
        if np.abs(step_F).max() < _TINY:
            break
    weights_F /= deviation_F
    weights_F[0] -= weights_F @ mean_F
    return weights_F


def _offset(levels: _Levels, logit_M: Float64Array) -> float | None:
    """Return the offset of the logits, the highest up to 0 with which the levels chosen are right often enough."""
    certain = math.log(CERTAIN / (1 - CERTAIN))
    for offset in _OFFSETS:
        certain_M = np.flatnonzero(logit_M + offset >= certain)
        _, first_M = np.unique(levels.query_M[certain_M], return_index=True)
        chosen_M = certain_M[first_M]
        weight_M = levels.weight_M[chosen_M]
        if len(chosen_M) >= _MIN_CHOSEN and weight_M @ levels.right_M[chosen_M] >= CERTAIN * weight_M.sum():
            return float(offset)
    return None
