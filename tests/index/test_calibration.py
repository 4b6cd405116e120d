"""Confidences, the in-catalog probability, and the stored forms of both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from index.calibration import CANDIDATES, Calibration, OpenSetModel, background

CALIBRATION = Calibration(
    slope=12.0, none_offset=2.0, none_slope=9.0, abstain_below=0.5, queries=1, correct=1, unknown=0
)  # fmt: skip
NO_EMBEDDING = np.zeros(2, np.float32)
OPEN_SET_MODEL = OpenSetModel(
    offset=-1.0,
    best=8.0,
    background=-4.0,
    width=0.5,
    landmarks_LD=np.eye(2, dtype=np.float32),
    level_L=np.array([1.0, -2.0]),
    slope_L=np.array([0.5, 3.0]),
)
WITH_MODEL = replace(CALIBRATION, open_set_model=OPEN_SET_MODEL)


def confidences_of(calibration: Calibration, scores: list[float], background: float) -> list[float]:
    return calibration.judge(scores, background, NO_EMBEDDING)[0]


def test_confidences_fall_with_the_score_and_never_overflow() -> None:
    steep = Calibration(**{**CALIBRATION.to_dict(), "slope": 1e6})
    assert confidences_of(steep, [1.0, 0.5, -1.0], 0.5) == [1.0, 0.0, 0.0]
    confidences = confidences_of(CALIBRATION, [0.9, 0.7, 0.7, 0.1], 0.5)
    assert confidences == sorted(confidences, reverse=True)
    in_catalog = CALIBRATION.judge([0.9, 0.7, 0.7, 0.1], 0.5, NO_EMBEDDING)[1]
    assert sum(confidences) == pytest.approx(in_catalog)
    assert sum(confidences_of(CALIBRATION, [0.9] * 40, 0.9)[:CANDIDATES]) < 1


def test_a_near_twin_and_a_high_background_lower_the_confidence() -> None:
    alone, twin = ([0.8, second, 0.3] for second in (0.3, 0.79))
    assert confidences_of(CALIBRATION, twin, 0.3)[0] < confidences_of(CALIBRATION, alone, 0.3)[0]
    assert confidences_of(CALIBRATION, alone, 0.7)[0] < confidences_of(CALIBRATION, alone, 0.3)[0]


def test_without_predictions_the_in_catalog_probability_is_zero() -> None:
    assert confidences_of(CALIBRATION, [], background([])) == []
    for calibration in (CALIBRATION, WITH_MODEL):
        assert calibration.judge([], background([]), NO_EMBEDDING)[1] == 0.0


def test_the_open_set_model_decides_the_in_catalog_probability_only() -> None:
    embedding_D = np.array([0.6, 0.8], np.float32)
    confidences, in_catalog = WITH_MODEL.judge([0.7, 0.4], 0.3, embedding_D)
    assert in_catalog == OPEN_SET_MODEL.probability(0.7, 0.3, embedding_D)
    assert in_catalog != CALIBRATION.judge([0.7, 0.4], 0.3, embedding_D)[1]
    assert confidences == confidences_of(CALIBRATION, [0.7, 0.4], 0.3)


def test_the_open_set_model_is_a_sigmoid_of_scores_and_nearness() -> None:
    embedding_D = np.array([0.6, 0.8], np.float32)
    near_1, near_2 = np.exp((0.6 - 1) / 0.5), np.exp((0.8 - 1) / 0.5)
    logit = -1 + 8 * 0.7 - 4 * 0.3 + near_1 * (1 + 0.5 * 0.7) + near_2 * (-2 + 3 * 0.7)
    assert OPEN_SET_MODEL.probability(0.7, 0.3, embedding_D) == pytest.approx(1 / (1 + np.exp(-logit)))
    assert OPEN_SET_MODEL.probability(1e6, 0.0, embedding_D) == 1.0
    assert OPEN_SET_MODEL.probability(-1e6, 0.0, embedding_D) == 0.0


def test_a_calibration_survives_json() -> None:
    assert Calibration.from_dict(json.loads(json.dumps(CALIBRATION.to_dict()))) == CALIBRATION
    assert Calibration.from_dict(WITH_MODEL.to_dict(), OPEN_SET_MODEL) == WITH_MODEL
    assert Calibration.from_dict({**CALIBRATION.to_dict(), "later": 1}) == CALIBRATION


def test_entries_are_written_in_the_same_order_by_every_process() -> None:
    """A set of names has another order in each process, and an export that is resumed gives the same bytes."""
    several = replace(CALIBRATION, open_set_model=OpenSetModel(offset=-1.0, best=8.0, background=-4.0))
    written = replace(CALIBRATION, views={2: several}).to_dict()["views"]["2"]
    assert list(written) == [*CALIBRATION.to_dict(), "offset", "best", "background"]
    assert Calibration.from_dict(written).judge([0.7], 0.3, NO_EMBEDDING) == several.judge([0.7], 0.3, NO_EMBEDDING)


def test_the_sigmoid_of_the_oldest_bundles_is_read() -> None:
    calibration = Calibration.from_dict({"a": 10.0, "b": -5.0, "abstain_below": 0.6, "queries": 20, "correct": 10})
    sigmoid = pytest.approx(1 / (1 + np.exp(-(10 * 0.7 - 5))))
    assert calibration.judge([0.7, 0.69], 0.2, NO_EMBEDDING)[1] == sigmoid
    assert confidences_of(calibration, [0.7, 0.69], 0.2)[0] == sigmoid
    assert (calibration.abstain_below, calibration.unknown) == (0.6, 0)


def test_an_open_set_model_survives_its_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    model = OpenSetModel(
        offset=rng.normal(), best=rng.normal(), background=rng.normal(), width=0.7,
        landmarks_LD=rng.normal(size=(9, 6)).astype(np.float16).astype(np.float32),
        level_L=rng.normal(size=9), slope_L=rng.normal(size=9),
    )  # fmt: skip
    files = [tmp_path / name for name in ("a.npz", "b.npz")]
    model.write(files[0])
    read = OpenSetModel.read(files[0])
    read.write(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    for query_D in rng.normal(size=(5, 6)).astype(np.float32):
        assert read.probability(0.6, 0.3, query_D) == model.probability(0.6, 0.3, query_D)
