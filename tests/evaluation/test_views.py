"""Views of drawn things: each has a direction, and its photographs are near to it."""

from __future__ import annotations

import numpy as np
import pytest

from core.arrays import normalised
from core.statistics import wilson_interval
from evaluation.views import Search, calibration_errors, top_1


def photographs(entities: int, several: int, *, noise: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    directions_ED = normalised(rng.normal(size=(entities, 24)).astype(np.float32))
    return {
        f"e{number}": normalised(
            (direction_D + noise * rng.normal(size=(5 if number < several else 1, 24)) / 24**0.5).astype(np.float32)
        )
        for number, direction_D in enumerate(directions_ED)
    }


def test_a_search_knows_each_entity_and_those_outside() -> None:
    search = Search({f"e{number}": np.eye(12, dtype=np.float32)[number] for number in range(12)})
    queries = {"e3": np.eye(12, dtype=np.float32)[[3, 3, 5]], "x": np.eye(12, dtype=np.float32)[[7]]}
    found = search.sets(queries, 1)
    assert found.own_N.tolist() == [3, 3, 3, -1]
    assert found.right[:, 0].tolist() == [True, True, False, False]
    assert found.in_catalog.tolist() == [True, True, True, False]
    pairs = search.sets(queries, 2)
    assert pairs.own_N.tolist() == [3, 3, 3]
    assert sorted(pairs.scores[:, 0].round(3).tolist()) == [0.707, 0.707, 1.0]


def test_more_photographs_find_more() -> None:
    embeddings = photographs(60, 40, noise=1.6)
    accuracies = top_1(embeddings, list(embeddings))
    shares = [accuracies[views][0] for views in (1, 2, 3, 4)]
    assert shares == sorted(shares)
    assert shares[0] < shares[3] - 10
    assert accuracies[3][1] == pytest.approx([100 * bound for bound in wilson_interval(0.4 * shares[2], 40)])


def test_errors_of_one_draw() -> None:
    embeddings = photographs(90, 80, noise=1.2)
    outliers_ND = normalised(np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32))
    errors = calibration_errors(embeddings, list(embeddings), outliers_ND, draws=1)
    assert sorted(errors) == [1, 2, 3, 4]
    assert all(0 < error < 0.25 for both in errors.values() for error, _ in both)
    assert all(0 < perfect < 0.2 for both in errors.values() for _, perfect in both)
