"""Sets of photographs, and the confidence fitted to them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from core.arrays import combined
from core.errors import BundleAltered
from export.calibrate import NotFitted, fit_to_scores
from export.leave_one_out import OwnQueries, own_sets
from export.queries import LabelledQueries, LabelledSearch
from export.views import combine_sets, fit_views, sets_of, validation_sets
from index.calibration import CANDIDATES, Calibration, OpenSetModel, background

SINGLE = Calibration(slope=20.0, none_offset=10.0, none_slope=0.0, abstain_below=0.5, queries=20, correct=10, unknown=5)


def searched(queries: int, *, slope: float = 12.0, seed: int = 0) -> LabelledSearch:
    """Draw searches whose best entity is right with the probability of a softmax of this slope and no "none"."""
    rng = np.random.default_rng(seed)
    scores_NF = np.sort(rng.uniform(0.2, 0.9, (queries, CANDIDATES + 1)))[:, ::-1]
    weights_NK = np.exp(slope * scores_NF[:, :CANDIDATES])
    own_N = np.array([rng.choice(CANDIDATES, p=each_K / each_K.sum()) for each_K in weights_NK])
    return LabelledSearch(
        own_N=own_N,
        group_N=np.arange(queries),
        rows_NF=np.tile(np.arange(CANDIDATES + 1), (queries, 1)),
        scores_NF=scores_NF,
        embeddings_ND=np.eye(queries, 3, dtype=np.float32),
    )


def test_sets_are_of_one_entity() -> None:
    group_N = np.array([0, 1, 0, 1, 0, 2, 0, 1])  # four of entity 0, three of 1, one of 2
    for views, spare, expected in ((2, 0, 6 + 3), (3, 0, 4 + 1), (4, 0, 1), (2, 1, 6 + 3), (3, 1, 4), (4, 1, 0)):
        sets_SV = sets_of(group_N, views, spare=spare)
        assert sets_SV.shape == (expected, views)
        assert len({tuple(each) for each in sets_SV.tolist()}) == expected
        for each_V in sets_SV:
            assert len(set(group_N[each_V])) == 1
            assert len(set(each_V.tolist())) == views
    of_many = sets_of(np.zeros(50, np.int64), 4)
    assert of_many.shape == (6, 4)
    assert (of_many == sets_of(np.zeros(50, np.int64), 4)).all()


def test_sets_become_queries() -> None:
    embeddings_ND = np.array([[1, 0], [0, 1], [0, 1], [0.6, 0.8]], np.float32)
    validation = LabelledQueries(
        own_N=np.array([3, -1, 3, -1]), group_N=np.array([0, 1, 0, 1]), embeddings_ND=embeddings_ND
    )  # fmt: skip
    pairs = validation_sets(validation, 2)
    found = dict(zip(pairs.own_N.tolist(), pairs.embeddings_ND.tolist(), strict=True))
    assert found[3] == pytest.approx([math.sqrt(0.5)] * 2)
    assert dict(zip(pairs.group_N.tolist(), pairs.own_N.tolist(), strict=True)) == {0: 3, 1: -1}
    assert len(validation_sets(validation, 3).own_N) == 0

    queries = OwnQueries(
        own_N=np.array([5, 5, 7, 7, 7]), position_NV=np.array([[8], [9], [-1], [-1], [-1]]),
        embeddings_ND=np.ones((5, 2), np.float32),
    )  # fmt: skip
    assert len(own_sets(queries, 2).own_N) == 0  # no image would be left; close-ups are no photographs of their own
    three = replace(queries, position_NV=np.array([[8], [9], [4], [5], [6]]))
    own = own_sets(three, 2)
    assert own.own_N.tolist() == [7, 7, 7]
    assert sorted(map(tuple, own.position_NV.tolist())) == [(4, 5), (4, 6), (5, 6)]
    assert combine_sets(three.embeddings_ND, np.zeros((0, 2), np.int64)).shape == (0, 2)


def test_the_mean_has_length_one_and_zero_stays() -> None:
    assert combined(np.array([[3, 0], [0, 3]], np.float32)).tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert combined(np.array([[1, 0], [-1, 0]], np.float32)).tolist() == [0, 0]


def test_every_number_of_photographs_has_its_own_fit() -> None:
    """As far as there are sets: a larger number has the fit of the largest smaller one."""
    by_views = {
        1: searched(400, seed=3),
        2: searched(3000),
        3: searched(3000, slope=30.0, seed=1),
        4: searched(29, seed=2),
    }
    fitted = fit_views(SINGLE, by_views[1], by_views.__getitem__)
    assert sorted(fitted.views) == [1, 2, 3]
    assert [fitted.of_views(number) for number in (1, 2, 3, 4, 8)] == [
        fitted.views[1], fitted.views[2], fitted.views[3], fitted.views[3], fitted.views[3],
    ]  # fmt: skip
    for views in (2, 3):
        test, calibration = searched(3000, slope=12.0 if views == 2 else 30.0, seed=9), fitted.of_views(views)
        judged = [
            calibration.judge(scores.tolist(), background(scores.tolist()), np.zeros(3, np.float32))
            for scores in test.scores
        ]
        confidence_N = np.array([confidences[0] for confidences, _ in judged])
        right_N = test.own_N == 0
        for low in np.arange(0, 1, 0.25):
            in_bin = (confidence_N >= low) & (confidence_N < low + 0.25)
            if in_bin.sum() > 200:
                assert confidence_N[in_bin].mean() == pytest.approx(right_N[in_bin].mean(), abs=0.06)
        # Without their entity, the same queries score lower: the catalog has it with a lower probability.
        without = [
            calibration.judge(scores.tolist(), background(scores.tolist()), np.zeros(3, np.float32))[1]
            for scores in test.scores_without
        ]
        assert np.mean([probability for _, probability in judged]) > np.mean(without) + 0.01
    assert fit_views(SINGLE, searched(29), lambda views: searched(29)) == replace(SINGLE, views={})


def test_known_of_one_photograph_stays() -> None:
    model = OpenSetModel(
        offset=-1.0, best=2.0, background=1.0, width=0.5, landmarks_LD=np.eye(3, dtype=np.float32),
        level_L=np.arange(3.0), slope_L=np.ones(3),
    )  # fmt: skip
    single = replace(SINGLE, open_set_model=model)
    fitted = fit_views(single, searched(400, seed=1), lambda views: searched(400, seed=views))
    read = Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())), model)
    embedding_D = np.array([0.6, 0.8, 0.0], np.float32)
    before, *after = (
        each.judge([0.8, 0.5], 0.5, embedding_D) for each in (single, fitted.of_views(1), read.of_views(1))
    )
    assert after[0] == after[1]
    assert before[1] == after[0][1]
    assert before[0] != after[0][0]
    assert fitted.of_views(1).abstain_below == single.abstain_below
    assert fitted.of_views(2).open_set_model != model


def test_a_ceiling_bounds_confidence() -> None:
    """A tenth of the queries show a twin of the best entity, which scores like any other."""
    found = searched(3000, slope=40.0)
    twin_N = np.arange(3000) % 10 == 0
    fitted = fit_to_scores(replace(found, own_N=np.where(twin_N, -1, found.own_N)))
    assert 0.85 < fitted.ceiling < 0.95
    confidences, _ = fitted.judge([0.9, 0.2, 0.1], 0.15, np.zeros(3, np.float32))
    assert sum(confidences) == pytest.approx(fitted.ceiling, abs=0.02)
    assert fitted.to_dict()["ceiling"] == fitted.ceiling
    assert "ceiling" not in SINGLE.to_dict()


def test_a_number_that_cannot_be_fitted_is_left_out() -> None:
    wrong = replace(searched(40), own_N=np.full(40, CANDIDATES))
    with pytest.raises(NotFitted):
        fit_to_scores(wrong)
    fitted = fit_views(SINGLE, searched(400), lambda views: wrong if views == 3 else searched(400))
    assert sorted(fitted.views) == [1, 2, 4]
    assert fitted.of_views(3) is fitted.views[2]


def test_fits_are_stored_so_that_older_readers_ignore_them() -> None:
    fitted = fit_views(SINGLE, searched(400, seed=1), lambda views: searched(400, seed=views))
    content = json.loads(json.dumps(fitted.to_dict()))
    read = Calibration.from_dict(content)
    assert read.to_dict() == fitted.to_dict()
    scores = [0.8, 0.5, 0.4]
    for views in (1, 2, 3, 4):
        once, again = (each.of_views(views).judge(scores, 0.4, np.zeros(3)) for each in (fitted, read))
        assert once == again
    assert "views" not in SINGLE.to_dict()  # the fingerprint of bundles without such fits stays
    # A reader of version 0.2 takes only the numbers that it knows.
    assert {name: content[name] for name in SINGLE.to_dict()} == SINGLE.to_dict()
    for damaged in ({"views": []}, {"views": {"two": {}}}, {"views": {"2": {**SINGLE.to_dict(), "slope": "1"}}}):
        with pytest.raises(BundleAltered, match="export the bundle again"):
            Calibration.from_dict({**SINGLE.to_dict(), **damaged})
