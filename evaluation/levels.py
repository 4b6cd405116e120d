"""How many queries get an answer at some level, how often it is right, and how many entities it leaves.

Levels are computed again from the ten best predictions, for thresholds other than the service's.

Shapes: N queries, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from core.arrays import BoolArray, Float64Array
from core.statistics import wilson_interval
from index.calibration import CANDIDATES, background
from index.levels import CERTAIN, LevelModel, TypeLevels

if TYPE_CHECKING:
    from evaluation.metrics import AnsweredQuery
    from index.store import StoredEntity
    from wikiclip.answers import Prediction

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
_MAX_THRESHOLDS = 500


class Step(NamedTuple):
    """A level that is the answer for some thresholds, up to its confidence."""

    confidence: float
    size: int
    right: bool


def level_steps(
    model: LevelModel, type_levels: TypeLevels, predictions: Sequence[Prediction], entity: StoredEntity
) -> tuple[Step, ...]:
    """Return a query's levels that are more certain than all more specific ones: the first one is the best entity."""
    candidates = predictions[:CANDIDATES]
    scores = [each.score for each in candidates]
    right = {key for key, _ in type_levels.of(entity.types)}
    steps: list[Step] = []
    if candidates:
        levels = model.levels(scores, background(scores), [type_levels.of(each.types) for each in candidates])
        for level, confidence in sorted(levels, key=lambda each: (each[0].key is not None, each[0].size, -each[1])):
            if not steps or confidence > steps[-1].confidence:
                of_entity = level.key is None
                is_right = candidates[0].entity_id == entity.entity_id if of_entity else level.key in right
                steps.append(Step(confidence, level.size, is_right))
    return tuple(steps)


def summarise_levels(answered: Sequence[AnsweredQuery]) -> dict[str, Any]:
    """Return the figures of queries whose entity is known, held out or not, empty without a level model.

    `answered`, `right` (of the answered ones) and `entity` (answered with an entity) are in percent. `entities_left` is
    the median size of a level. `curve` has the same for several thresholds, and for the best entities alone.
    `at_90_right` has the largest shares of queries that can be answered with nine in ten right: at `any` level, that is
    the most certain one, at the `most_specific` one that reaches a threshold, as the service answers, and with an
    `entity`, ranked by this probability or by its `confidence`, whichever answers more. `ratio` is any / entity.
    """
    queries = [each for each in answered if each.levels is not None]
    steps_N = [each.levels or () for each in queries]
    if not queries or not any(steps_N):
        return {}
    curve = _Curve(steps_N)
    confidences = [each.best.confidence or 0.0 if each.best else 0.0 for each in queries]
    right_N = np.array([each.rank == 1 for each in queries])
    by_level_N = np.array([steps[0].confidence if steps else 0.0 for steps in steps_N])
    entity = max(_coverage(each, right_N) for each in (np.array(confidences), by_level_N))
    most_certain = [steps[-1] if steps else Step(0.0, 0, False) for steps in steps_N]
    any_level = _coverage(
        *(np.array([getattr(each, name) for each in most_certain]) for name in ("confidence", "right"))
    )
    return {
        "queries": len(queries),
        **curve.at(CERTAIN),
        "curve": [curve.at(threshold) for threshold in THRESHOLDS],
        "at_90_right": {
            "any": round(100 * any_level, 2),
            "most_specific": round(100 * curve.best_coverage(), 2),
            "entity": round(100 * entity, 2),
            "ratio": round(any_level / entity, 3) if entity else None,
        },
    }


class _Curve:
    """The steps of all queries, padded with infinite confidences."""

    def __init__(self, steps_N: Sequence[Sequence[Step]]) -> None:
        shape = len(steps_N), max(map(len, steps_N)) + 1
        self.confidence_NS = np.full(shape, np.inf)
        self._size_NS, self._right_NS = np.zeros(shape), np.zeros(shape, bool)
        for query, steps in enumerate(steps_N):
            for number, step in enumerate(steps):
                self.confidence_NS[query, number], self._size_NS[query, number] = step.confidence, step.size
                self._right_NS[query, number] = step.right

    def at(self, threshold: float) -> dict[str, Any]:
        answered_N, right_N, size_N, is_entity_N = self._chosen(threshold)
        queries, answered, right = len(answered_N), int(answered_N.sum()), int(right_N.sum())
        first_N = np.isfinite(self.confidence_NS[:, 0]) & (self.confidence_NS[:, 0] >= threshold)
        return {
            "threshold": threshold,
            "answered": round(100 * answered / queries, 2),
            "right": round(100 * right / answered, 2) if answered else None,
            "right_interval": tuple(round(100 * each, 2) for each in wilson_interval(right, answered)),
            "entities_left": float(np.median(size_N[answered_N])) if answered else None,
            "entity": round(100 * is_entity_N.sum() / queries, 2),
            "entity_right": round(100 * self._right_NS[first_N, 0].mean(), 2) if first_N.any() else None,
        }

    def best_coverage(self) -> float:
        """Return the largest share of queries with a level at a threshold at which nine in ten are right."""
        finite = np.unique(self.confidence_NS[np.isfinite(self.confidence_NS)])
        thresholds = np.unique(np.quantile(finite, np.linspace(0, 1, _MAX_THRESHOLDS), method="nearest"))
        shares = [0.0]
        for threshold in thresholds.tolist():
            answered_N, right_N, _, _ = self._chosen(threshold)
            if right_N.sum() >= CERTAIN * answered_N.sum():
                shares.append(float(answered_N.mean()))
        return max(shares)

    def _chosen(self, threshold: float) -> tuple[BoolArray, BoolArray, Float64Array, BoolArray]:
        """Return which queries are answered, which of them right, the sizes, and which with an entity."""
        number_N = (self.confidence_NS < threshold).sum(axis=1)
        rows_N = np.arange(len(number_N))
        answered_N = np.isfinite(self.confidence_NS[rows_N, number_N])
        right_N = answered_N & self._right_NS[rows_N, number_N]
        return answered_N, right_N, self._size_NS[rows_N, number_N], answered_N & (number_N == 0)


def _coverage(confidence_N: Float64Array, right_N: BoolArray) -> float:
    """Return the largest share of queries above a threshold at which nine in ten are right."""
    order_N = np.argsort(-confidence_N, kind="stable")
    answered_N = np.arange(1, len(order_N) + 1)
    last_N = np.append(np.diff(confidence_N[order_N]) < 0, True)  # no threshold separates equal ones
    enough_N = last_N & (np.cumsum(right_N[order_N]) >= CERTAIN * answered_N)
    return float(answered_N[enough_N].max(initial=0) / len(order_N))
