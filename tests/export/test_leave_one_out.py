"""A catalog's own images as queries: scores equal a slow loop, confused pairs are counted, views are deterministic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.statistics import wilson_interval
from export.config import ExportConfig
from export.leave_one_out import OwnQueries, confused_pairs, search_own
from imaging.preprocess import changed_view
from index.build import build_index
from index.embeddings import EmbeddingShards, Pooling, pooled, write_shard
from index.manifest import INDEX_FILE
from index.search import EntityIndex

DIM = 12


@pytest.mark.parametrize("pooling", ["nearest", "mean"])
def test_own_scores_leave_the_query_out(tmp_path: Path, pooling: Pooling) -> None:
    rng = np.random.default_rng(3)
    rows_N = np.array([row for row in range(30) for _ in range(1 + row % 4)])
    (tmp_path / "embeddings").mkdir()
    write_shard(tmp_path / "embeddings", 0, rows_N, rng.normal(size=(len(rows_N), DIM)).astype(np.float32))
    images = EmbeddingShards(tmp_path / "embeddings", DIM)
    searched = pooled(images, pooling)
    build_index(tmp_path, searched)
    index = EntityIndex.read(tmp_path / INDEX_FILE, searched, {})
    several_N = np.flatnonzero(np.bincount(rows_N)[rows_N] > 1)
    view_D = images.at(np.array([0])) + 0.1
    queries = OwnQueries(
        own_N=np.append(rows_N[several_N], 0),
        position_NV=np.append(several_N, -1)[:, None],
        embeddings_ND=np.concatenate([images.at(several_N), view_D / np.linalg.norm(view_D)]),
    )
    config = ExportConfig(catalog=tmp_path, out=tmp_path, batch_size=7)
    found = search_own(queries, config, index, images, pooling)
    for number, position in enumerate(queries.position_NV[:, 0]):
        query_D, own = queries.embeddings_ND[number], int(queries.own_N[number])
        expected = {}
        for row in range(30):
            others_ID = images.at(np.flatnonzero((rows_N == row) & (np.arange(len(rows_N)) != position)))
            if pooling == "nearest":
                expected[row] = float((others_ID @ query_D).max())
                continue
            gram, cosines = others_ID @ others_ID.T, others_ID @ query_D
            if row == own and position >= 0:  # one more image, with the mean cosine to the query and to the others
                edge = np.full((len(gram), 1), cosines.mean())
                gram = np.block([[gram, edge], [edge.T, np.ones((1, 1))]])
                cosines = np.append(cosines, cosines.mean())
            expected[row] = float(cosines.sum() / np.sqrt(gram.sum()))
        best = sorted(expected, key=lambda row: -expected[row])[:11]
        assert found.rows_NF[number].tolist() == best
        np.testing.assert_allclose(found.scores_NF[number], [expected[row] for row in best], atol=5e-4)


def test_pairs_are_ordered_by_errors_then_similarity() -> None:
    rows_NF = np.array([[1, 0], [0, 1], [0, 1], [2, 3], [4, -1]])
    scores_NF = np.array([[0.9, 0.5], [0.8, 0.7], [0.8, 0.6], [0.9, 0.85], [0.7, np.nan]])
    own_N = np.array([0, 1, 1, 2, 4])
    pairs = confused_pairs(own_N, rows_NF, scores_NF)
    assert pairs == [((0, 1), 3, pytest.approx((0.9 + 0.8 + 0.8) / 3, abs=1e-4)), ((2, 3), 0, 0.85)]


def test_equal_seeds_give_equal_views() -> None:
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    one, same, other = (changed_view(pixels_HW3, seed, (0.25, 0.5)) for seed in ((5, 0), (5, 0), (5, 1)))
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, same)
    assert np.abs(one.astype(int) - other).mean() > 2


def test_the_wilson_interval() -> None:
    assert wilson_interval(60, 60) == pytest.approx((0.9398, 1.0), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)
