"""The level of an answer, against slow and obvious code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import BundleAltered
from index.calibration import Calibration
from index.levels import LevelModel, TypeLevels, most_specific
from index.types import TypeHierarchy, TypeParents

MODEL = LevelModel(slope=9.0, weights=(-0.5, 1.2, 2.0, -1.0, -0.7, 0.1))


def slow_levels(
    scores: list[float], own: list[tuple[str, ...]], types: TypeHierarchy, sizes: dict[str, int], most: float
) -> dict[str | None, tuple[int, float]]:
    """Return size and confidence by level, for a background of 0.3."""
    powers = np.exp(MODEL.slope * np.array(scores))
    shares = powers / powers.sum()
    members: dict[str | None, list[int]] = {None: [0]}
    for number, each in enumerate(own):
        for key in types.ancestors(each):
            if sizes.get(key, 0) <= most:
                members.setdefault(key, []).append(number)
    found = {}
    for key, numbers in members.items():
        share, size = float(shares[numbers].sum()), 1 if key is None else sizes.get(key, 0)
        odds = math.log(max(share, 1e-4) / max(1 - share, 1e-4))
        best = max(scores[number] for number in numbers)
        x = (1, odds, best, 0.3, key is None, math.log(max(size, 1)))
        found[key] = (size, float(1 / (1 + np.exp(-np.dot(MODEL.weights, x)))))
    return found


def test_levels_equal_a_loop_over_types_and_candidates() -> None:
    rng = np.random.default_rng(0)
    names = [f"t{number}" for number in range(12)]
    kinds = set()
    for _ in range(200):
        rows = [TypeParents(type=each, parents=tuple(rng.choice(names, 2))) for each in names[:8]]
        types = TypeHierarchy(rows)
        sizes = {each: int(rng.integers(1, 30)) for each in names[:-1]}
        scores = sorted(rng.uniform(0, 1, int(rng.integers(1, 11))).tolist(), reverse=True)
        own = [tuple(rng.choice(names, int(rng.integers(0, 3)))) for _ in scores]
        type_levels = TypeLevels(types, sizes, 200)
        found = list(MODEL.levels(scores, 0.3, [type_levels.of(each) for each in own]))
        expected = slow_levels(scores, own, types, sizes, 20.0)
        assert {level.key: (level.size, pytest.approx(confidence)) for level, confidence in found} == expected
        for certain in (0.3, 0.9):
            chosen = most_specific(found, certain)
            sure = {key: each for key, each in expected.items() if each[1] >= certain}
            if not sure:
                assert chosen is None
                continue
            assert chosen is not None
            assert chosen[0].key in sure
            if None in sure:
                assert chosen[0].key is None
            else:
                assert (chosen[0].size, -chosen[1]) == pytest.approx(min((size, -p) for size, p in sure.values()))
            kinds.add((certain, chosen[0].key is None))
    assert kinds == {(0.3, True), (0.3, False), (0.9, True), (0.9, False)}


def test_a_calibration_keeps_its_level_model() -> None:
    plain = Calibration(slope=1.0, none_offset=0.0, none_slope=0.0, abstain_below=0.5, queries=1, correct=1, unknown=0)
    assert "level" not in plain.to_dict()
    assert Calibration.from_dict(plain.to_dict()).level is None
    content = {
        **plain.to_dict(),
        "level": MODEL.to_dict(),
        "views": {"2": {**plain.to_dict(), "level": MODEL.to_dict()}},
    }
    read = Calibration.from_dict(content)
    assert (read.level, read.of_views(1).level, read.of_views(3).level) == (MODEL, MODEL, MODEL)
    assert read.to_dict() == content
    for level in ({}, {"slope": 1.0}, {"slope": "x", "weights": [1]}, {"slope": 1.0, "weights": [1.0]}, [1], None):
        with pytest.raises(BundleAltered, match=r"calibration\.level"):
            Calibration.from_dict({**content, "level": level})
