"""Choosing an index by measurement, and tuning its parameters to the recall."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from core.errors import UserError
from index.autotune import K, Targets, candidates, choose, exact_positions, expected_ms, held_out_queries, lists
from index.build import build_index
from index.embeddings import Embeddings, EmbeddingShards, write_shard
from index.faiss_index import centroids, exact_lists, factory_index, train
from index.manifest import INDEX_FILE, INDEX_MANIFEST_FILE, IndexManifest
from index.search import EntityIndex

DIM = 32
COUNT = 3000
LOOSE = Targets(budget_ms=1e6, recall=0.9, memory_gb=1)


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingShards:
    folder = tmp_path_factory.mktemp("embeddings")
    rng = np.random.default_rng(0)
    centres_CD = rng.normal(size=(40, DIM))
    for shard in range(3):
        vectors_nD = centres_CD[rng.integers(40, size=COUNT // 3)] + 0.5 * rng.normal(size=(COUNT // 3, DIM)) + 0.5
        vectors_nD /= np.linalg.norm(vectors_nD, axis=1, keepdims=True)
        rows_n = np.arange(COUNT // 3, dtype=np.int64) + shard * (COUNT // 3)
        write_shard(folder, shard, rows_n, vectors_nD.astype(np.float32))
    return EmbeddingShards(folder, DIM)


def test_exact_search_is_chosen_if_it_fits(embeddings: EmbeddingShards) -> None:
    factory, _, measured = choose(embeddings, LOOSE)
    assert factory == "SQfp16"  # bundles store float16
    assert [each["verdict"] for each in measured] == ["chosen"]


def test_candidates_that_need_too_much_memory_are_skipped(embeddings: EmbeddingShards) -> None:
    flat_gb = 4 * DIM * COUNT / 1e9
    factory, _, measured = choose(embeddings, Targets(budget_ms=1e6, recall=0.9, memory_gb=flat_gb / 4))
    assert factory == "PQ8x4fs"
    assert all("curves" not in exact for exact in measured[:2])


def test_impossible_targets_are_refused(embeddings: EmbeddingShards) -> None:
    with pytest.raises(UserError, match="no index is expected to meet") as caught:
        choose(embeddings, Targets(budget_ms=1e6, recall=0.9, memory_gb=1e-9))
    assert "--memory-gb" in str(caught.value)


@pytest.mark.parametrize("factory", ["PQ8x4fs", "IVF32_HNSW32,PQ8x4fs", "IVF32(SQfp16),PQ16x4fsr", "HNSW16"])
def test_parameters_are_tuned_to_the_recall(embeddings: EmbeddingShards, tmp_path: Path, factory: str) -> None:
    manifest = build_index(tmp_path, embeddings, factory=factory, targets=LOOSE)
    assert IndexManifest.read(tmp_path / INDEX_MANIFEST_FILE) == manifest
    assert manifest.choice is not None
    assert manifest.choice["curve"]
    index = EntityIndex.read(tmp_path / INDEX_FILE, embeddings, manifest.parameters)
    queries_QD = held_out_queries(embeddings, np.random.default_rng(5).integers(COUNT, size=300), 6)
    rows_QK, _ = index.search(queries_QD, K)
    truth_QK = exact_positions(embeddings, queries_QD)
    hits = sum(len(set(found) & set(true)) for found, true in zip(rows_QK.tolist(), truth_QK.tolist(), strict=True))
    assert hits / truth_QK.size >= LOOSE.recall - 0.02


def test_queries_leave_their_embeddings_in_directions_in_which_embeddings_vary() -> None:
    rng = np.random.default_rng(3)
    drawn = rng.normal(size=(2000, DIM)) + 2 * np.eye(DIM)[0]  # all share a direction
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    embeddings = Embeddings(DIM, [drawn.astype(np.float16)], [np.arange(2000)])
    positions_Q = np.random.default_rng(7).integers(2000, size=500)
    queries_QD, at_QD = held_out_queries(embeddings, positions_Q, 7), embeddings.at(positions_Q)
    np.testing.assert_allclose(np.sum(queries_QD * at_QD, axis=1), 0.8, atol=1e-3)
    away_Q = (queries_QD - 0.8 * at_QD) @ drawn.mean(axis=0)
    assert abs(float(away_Q.mean())) < 3 * float(away_Q.std()) / 500**0.5


def test_times_are_extrapolated() -> None:
    assert expected_ms({100: 2.0}, 100, True) == 2.0
    assert expected_ms({100: 2.0, 200: 3.0}, 400, True) == pytest.approx(5.0)
    assert expected_ms({100: 2.0, 400: 4.0}, 1600, False) == pytest.approx(8.0)
    assert expected_ms({100: 2.0, 400: 1.0}, 1600, False) == 1.0


def test_lists_and_sizes_for_wikipedia() -> None:
    assert lists(6_063_945) == 8192
    memory_gb = {each.factory(6_063_945): each.bytes(6_063_945) / 1e9 for each in candidates(6_063_945, 512)}
    assert memory_gb["Flat"] == pytest.approx(12.42, abs=0.01)
    assert memory_gb["IVF8192(SQfp16),PQ256x4fsr"] == pytest.approx(0.833, abs=0.001)


def test_filling_uses_float32_centroids_and_searching_the_stored_ones() -> None:
    drawn = np.random.default_rng(4).normal(size=(2000, 16)).astype(np.float32)
    embeddings = Embeddings(16, [drawn.astype(np.float16)], [np.arange(2000)])
    indexes = [factory_index(16, factory) for factory in ("IVF32(SQfp16),Flat", "IVF32,Flat")]
    for index in indexes:
        train(index, embeddings, "IVF")
        with exact_lists(index):
            index.add(embeddings.at(np.arange(2000)))
    in_half, in_full = (faiss.extract_index_ivf(index) for index in indexes)
    assert isinstance(faiss.downcast_index(in_half.quantizer), faiss.IndexScalarQuantizer)
    assert isinstance(faiss.downcast_index(in_full.quantizer), faiss.IndexFlat)
    assert in_half.own_fields
    sizes = [[each.invlists.list_size(number) for number in range(32)] for each in (in_half, in_full)]
    assert np.abs(np.subtract(*sizes)).sum() <= 20  # rounded centroids change few assignments
    parameters = faiss.SearchParametersIVF(nprobe=32)
    found, expected = (index.search(drawn[:50], 5, params=parameters)[1] for index in indexes)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("lists", [64, 600])
def test_centroids_have_unit_length_and_are_distinct(lists: int) -> None:
    sample_SD = np.random.default_rng(1).normal(size=(600, 8)).astype(np.float32)
    sample_SD[:300] = sample_SD[0] + 0.01 * sample_SD[:300]
    sample_SD /= np.linalg.norm(sample_SD, axis=1, keepdims=True)
    centroids_LD = centroids(sample_SD, lists)
    assert centroids_LD.shape == (lists, 8)
    np.testing.assert_allclose(np.linalg.norm(centroids_LD, axis=1), 1, atol=1e-5)
    assert len(np.unique(centroids_LD, axis=0)) == lists
