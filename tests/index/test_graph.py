"""Exact search as an ONNX graph, on the CPU: it finds what brute force finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from core.arrays import Device, DeviceArray, normalised
from core.errors import BadParameter, BundleAltered
from core.runtime import onnxruntime
from index.build import build_index
from index.embeddings import Embeddings, EmbeddingShards, pooled, write_shard
from index.graph import GraphCandidates
from index.manifest import INDEX_FILE
from index.search import EntityIndex
from index.store import Selection

DIM = 16
CPU = Device("cpu")
ONE_BLOCK = 2**30


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return normalised(np.asarray(vectors, np.float32))


def stored(kind: str, count: int, seed: int = 0) -> npt.NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    if kind == "random":
        vectors = rng.normal(size=(count, DIM))
    elif kind == "clustered":
        vectors = unit(rng.normal(size=(20, DIM)))[rng.integers(0, 20, count)] + 0.02 * rng.normal(size=(count, DIM))
    elif kind == "nearly equal":  # closer than float16 tells apart, so no few candidates are certain to be the best
        vectors = unit(rng.normal(size=(1, DIM))) + 1e-4 * rng.normal(size=(count, DIM))
    else:
        assert kind == "equal"
        vectors = np.repeat(rng.normal(size=(1, DIM)), count, axis=0)
    return unit(vectors).astype(np.float16)


def embeddings_of(vectors_ND: npt.NDArray[np.float16], parts: int = 3) -> Embeddings:
    rows = np.arange(len(vectors_ND))
    return Embeddings(vectors_ND.shape[1], np.array_split(vectors_ND, parts), np.array_split(rows, parts))


def queries_near(vectors_ND: npt.NDArray[np.float16], count: int = 12) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(9)
    near = vectors_ND[rng.integers(0, len(vectors_ND), count)].astype(np.float32)
    return unit(near + 0.05 * rng.normal(size=near.shape))


def brute_force(
    vectors_ND: npt.NDArray[np.float16], queries_QD: npt.NDArray[np.float32], allowed_N: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.float32]:
    """Cosines [Q, N], minus infinity for vectors that are not allowed."""
    cosines_QN = queries_QD @ normalised(vectors_ND).T
    return cosines_QN if allowed_N is None else np.where(allowed_N, cosines_QN, -np.inf)


def check(
    candidates: GraphCandidates,
    vectors_ND: npt.NDArray[np.float16],
    count: int,
    allowed_N: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Ids are those of brute force, except for ties within 1e-6; cosines are within 1e-6."""
    queries_QD = queries_near(vectors_ND)
    cosines_QN = brute_force(vectors_ND, queries_QD, allowed_N)
    best_QK = -np.sort(-cosines_QN, axis=1)[:, :count]
    there_QK = np.isfinite(best_QK)
    scores_QK, positions_QK = candidates.search(queries_QD, count, {}, allowed_N, 1.0)
    np.testing.assert_array_equal(positions_QK >= 0, there_QK)
    np.testing.assert_allclose(scores_QK[there_QK], best_QK[there_QK], rtol=0, atol=1e-6)
    named_QK = np.take_along_axis(cosines_QN, np.maximum(positions_QK, 0), axis=1)
    np.testing.assert_allclose(named_QK[there_QK], best_QK[there_QK], rtol=0, atol=1e-6)
    for positions_K in positions_QK:
        found = positions_K[positions_K >= 0]
        assert len(set(found.tolist())) == len(found)


@pytest.mark.parametrize("kind", ["random", "clustered", "nearly equal", "equal"])
@pytest.mark.parametrize(
    ("count", "block_elements", "devices"),
    [(5000, ONE_BLOCK, 1), (5000, 1000 * DIM, 1), (5000, 1000 * DIM, 3), (300, ONE_BLOCK, 1), (1, ONE_BLOCK, 1)],
)
def test_it_finds_what_brute_force_finds(kind: str, count: int, block_elements: int, devices: int) -> None:
    vectors_ND = stored(kind, count)
    candidates = GraphCandidates(embeddings_of(vectors_ND), [CPU] * devices, block_elements)
    check(candidates, vectors_ND, min(10, count))


@pytest.mark.parametrize("top_k", [1, 255, 256, 257, 700])
def test_more_results_than_a_group_or_a_block_has_vectors(top_k: int) -> None:
    vectors_ND = stored("random", 700)
    candidates = GraphCandidates(embeddings_of(vectors_ND), [CPU], 256 * DIM)
    assert candidates.limit == 700
    check(candidates, vectors_ND, top_k)


@pytest.mark.parametrize("allowed", [0, 1, 10, 4999])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_filter_leaves_what_it_allows(allowed: int, devices: int) -> None:
    vectors_ND = stored("clustered", 5000)
    candidates = GraphCandidates(embeddings_of(vectors_ND), [CPU] * devices, 1000 * DIM)
    for seed in range(2):  # another filter follows
        allowed_N = np.zeros(5000, np.bool_)
        allowed_N[np.random.default_rng(seed).permutation(5000)[:allowed]] = True
        check(candidates, vectors_ND, 20, allowed_N)
    check(candidates, vectors_ND, 20)


def test_padding_is_never_found() -> None:
    """The vectors that fill the last group have a cosine of 0, above all that are there."""
    direction_D = unit(np.ones((1, DIM)))
    candidates = GraphCandidates(embeddings_of((-direction_D).astype(np.float16).repeat(3, axis=0)), [CPU])
    scores_1K, positions_1K = candidates.search(direction_D, 3, {}, None, 1.0)
    assert positions_1K.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(scores_1K, -1, atol=1e-6)


def test_equal_vectors_are_found_in_order() -> None:
    candidates = GraphCandidates(embeddings_of(stored("equal", 3000)), [CPU], 1000 * DIM)
    _, positions_QK = candidates.search(queries_near(stored("equal", 3)), 40, {}, None, 1.0)
    np.testing.assert_array_equal(positions_QK, np.tile(np.arange(40), (12, 1)))


def test_queries_need_not_be_normalised() -> None:
    vectors_ND = stored("random", 500)
    candidates = GraphCandidates(embeddings_of(vectors_ND), [CPU])
    queries_QD = queries_near(vectors_ND)
    expected, found = (candidates.search(scale * queries_QD, 5, {}, None, 1.0) for scale in (1, 1000))
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    vectors_ND = stored("random", 500)
    queries_QD = queries_near(vectors_ND)
    queries_QD[3, 2] = bad
    with pytest.raises(BadParameter, match="not finite"):
        GraphCandidates(embeddings_of(vectors_ND), [CPU]).search(queries_QD, 5, {}, None, 1.0)
    vectors_ND[400, 1] = bad
    with pytest.raises(BundleAltered, match="not finite"):
        GraphCandidates(embeddings_of(vectors_ND), [CPU])


def test_queries_on_the_device_are_not_copied_to_the_host() -> None:
    vectors_ND = stored("random", 500)
    candidates = GraphCandidates(embeddings_of(vectors_ND), [CPU])
    queries_QD = queries_near(vectors_ND)
    copies: list[int] = []

    def to_host() -> npt.NDArray[np.float32]:
        copies.append(1)
        return queries_QD

    value = onnxruntime.OrtValue.ortvalue_from_numpy(queries_QD)
    expected = candidates.search(queries_QD, 5, {}, None, 1.0)
    found = candidates.search(DeviceArray(value, CPU, to_host), 5, {}, None, 1.0)
    np.testing.assert_array_equal(found[1], expected[1])
    assert not copies
    elsewhere = candidates.search(DeviceArray(value, Device("cuda"), to_host), 5, {}, None, 1.0)
    np.testing.assert_array_equal(elsewhere[1], expected[1])
    assert len(copies) == 1


@pytest.mark.parametrize("pooling", ["nearest", "mean"])
def test_entities_with_several_images(tmp_path: Path, pooling: str) -> None:
    """Entities, scores and order are those of the index on the CPU, also with a filter and more than there are."""
    (tmp_path / "embeddings").mkdir()
    vectors_ND = stored("clustered", 3000)
    rows_N = np.sort(np.random.default_rng(1).integers(0, 800, 3000))
    for shard, half in enumerate((slice(0, 1700), slice(1700, 3000))):
        write_shard(tmp_path / "embeddings", shard, rows_N[half], vectors_ND[half])
    embeddings = pooled(EmbeddingShards(tmp_path / "embeddings", DIM), pooling)  # type: ignore[arg-type]
    build_index(tmp_path, embeddings, factory="Flat")
    cpu, graph = (EntityIndex.read(tmp_path / INDEX_FILE, embeddings, {}, device) for device in ("cpu", "graph"))
    assert isinstance(graph.candidates, GraphCandidates)
    assert (graph.device, graph.device_why) == ("cpu", "the graph, as asked for")
    few, many = np.zeros(800, np.bool_), np.zeros(800, np.bool_)
    few[::80], many[::2] = True, True
    for selection in (None, Selection(("few",), few), Selection(("many",), many)):
        for top_k in (1, 7, 900):
            queries_QD = queries_near(vectors_ND)
            expected, found = (index.search(queries_QD, top_k, selection=selection) for index in (cpu, graph))
            np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-6)
            tied = np.minimum(*(np.abs(np.diff(expected[1], axis=1, **end)) for end in ({"prepend": 2}, {"append": 2})))
            assert not ((found[0] != expected[0]) & (tied > 2e-6)).any()
