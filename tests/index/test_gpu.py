"""Searching on GPUs: decisions without a GPU, and equality with the CPU on machines that have one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from core.errors import UserError
from index import gpu
from index.build import build_index
from index.embeddings import Embeddings, EmbeddingShards, write_shard
from index.faiss_index import CpuCandidates, one_thread
from index.gpu import GpuCandidates, NotOnGpuError, equal_shares, placement, sharded_flat
from index.manifest import INDEX_FILE
from index.search import EntityIndex
from index.store import Selection

DIM = 16
RESERVED = gpu.SCRATCH_BYTES + gpu.RESERVED_BYTES
GPUS = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
on_a_gpu = pytest.mark.skipif(GPUS == 0, reason="faiss sees no GPU")


def made(count: int, seed: int = 0, parts: int = 3) -> Embeddings:
    drawn = np.random.default_rng(seed).normal(size=(count, DIM))
    vectors_ND = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return Embeddings(DIM, np.array_split(vectors_ND, parts), np.array_split(np.arange(count) // 2, parts))


def queries(count: int = 20) -> npt.NDArray[np.float32]:
    return np.random.default_rng(9).normal(size=(count, DIM)).astype(np.float32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: for tiny searches on a busy machine, threads mostly wait for each other."""
    with one_thread():
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> EmbeddingShards:
    (tmp_path / "embeddings").mkdir()
    embeddings = made(3000)
    write_shard(tmp_path / "embeddings", 0, embeddings.rows_N, embeddings.stored(np.arange(3000)))
    return EmbeddingShards(tmp_path / "embeddings", DIM)


class TestSharing:
    def test_one_vector_too_many_is_refused(self) -> None:
        assert equal_shares([RESERVED + 1000, RESERVED + 1000], 200, 10) == [0, 1]
        with pytest.raises(NotOnGpuError, match=r"201 vectors need 0\.0 GB, 2 GPU\(s\) have 0\.0 GB left"):
            equal_shares([RESERVED + 1000, RESERVED + 1000], 201, 10)

    def test_full_gpus_do_not_count(self) -> None:
        with pytest.raises(NotOnGpuError):
            equal_shares([RESERVED - 1, 0], 1, 10)

    def test_equal_shares_leave_out_gpus_without_room(self) -> None:
        assert equal_shares([RESERVED + 1000, RESERVED + 90, RESERVED + 600], 100, 10) == [0, 2]
        assert equal_shares([RESERVED + 1000, RESERVED + 400, RESERVED + 400], 100, 10) == [0, 1, 2]

    def test_fixed_bytes_per_gpu_count(self) -> None:
        assert equal_shares([RESERVED + 1100], 100, 10, 100) == [0]
        with pytest.raises(NotOnGpuError):
            equal_shares([RESERVED + 1100], 100, 10, 101)


@pytest.mark.parametrize("counts", [[100], [60, 40], [0, 33, 67]])
def test_blocks_give_the_results_of_one_index(counts: list[int]) -> None:
    embeddings, placed = made(100), []
    index = sharded_flat(
        embeddings,
        counts,
        lambda on: placed.append(on) or faiss.IndexFlatIP(DIM),  # type: ignore[func-returns-value]
        block_bytes=17 * 4 * DIM,
    )
    one = faiss.IndexFlatIP(DIM)
    one.add(np.concatenate(list(embeddings)))
    found, expected = GpuCandidates(index, None).search(queries(), 100, {}, None, 1), one.search(queries(), 100)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert [placed.count(on) for on in range(len(counts))] == [-(-count // 17) for count in counts]


@pytest.mark.parametrize(
    ("count", "blocks"), [(0, 0), (1, 1), (99_999, 1), (100_000, 2), (350_001, 7), (6_063_945, 8), (60_000_000, 43)]
)
def test_many_vectors_are_divided_into_several_blocks(count: int, blocks: int) -> None:
    sizes = gpu._block_sizes(count, 768)
    assert (len(sizes), sum(sizes)) == (blocks, count)
    assert all(4 * 768 * size <= gpu._BLOCK_BYTES for size in sizes)


def test_blocks_are_searched_in_parallel() -> None:
    embeddings = made(150_000, parts=7)
    one = faiss.IndexFlatIP(DIM)
    one.add(np.concatenate(list(embeddings)))
    index = sharded_flat(embeddings, [150_000], lambda _: faiss.IndexFlatIP(DIM))
    blocks = faiss.downcast_index(index.at(0))
    assert (blocks.count(), index.ntotal) == (3, 150_000)
    found, expected = GpuCandidates(index, None).search(queries(5), 50, {}, None, 1), one.search(queries(5), 50)
    np.testing.assert_array_equal(found[1], expected[1])


def test_shards_give_the_results_of_the_cpu(bundle: EmbeddingShards) -> None:
    flat = faiss.IndexFlatIP(DIM)
    flat.add(np.concatenate(list(bundle)))
    cpu = EntityIndex(CpuCandidates(flat), bundle, {})
    shared = EntityIndex(
        GpuCandidates(sharded_flat(bundle, [2000, 1000], lambda _: faiss.IndexFlatIP(DIM)), None), bundle, {}
    )
    few, many = np.zeros(1500, bool), np.zeros(1500, bool)
    few[::700], many[::2] = True, True
    for selection in (None, Selection(("few",), few), Selection(("many",), many)):
        for top_k in (1, 7, 1500):
            found = shared.search(queries(4), top_k, selection=selection)
            expected = cpu.search(queries(4), top_k, selection=selection)
            np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
            assert np.mean(found[0] == expected[0]) > 0.99  # sums are rounded differently, so near ties may swap


def test_nprobe_is_chosen_for_each_call() -> None:
    vectors_ND = np.concatenate(list(made(2000)))
    shards = faiss.IndexShards(DIM, False, False)
    one = faiss.index_factory(DIM, "IVF16,Flat", faiss.METRIC_INNER_PRODUCT)
    one.train(vectors_ND)
    for start in (0, 1000):
        part = faiss.clone_index(one)
        part.add_with_ids(vectors_ND[start : start + 1000], np.arange(start, start + 1000))
        shards.add_shard(part)
    one.add(vectors_ND)
    candidates = GpuCandidates(shards, 16)
    for nprobe, effort in ((1, 1.0), (3, 1.0), (2, 4.0), (1, float("inf"))):
        found = candidates.search(queries(), 10, {"nprobe": nprobe}, None, effort)
        expected = CpuCandidates(one).search(queries(), 10, {"nprobe": nprobe}, None, effort)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    assert candidates.efforts()[-1] == {"nprobe": 16}


def test_a_gpu_is_not_asked_for_more_results_than_its_limit() -> None:
    index = faiss.IndexFlatIP(DIM)
    index.add(np.concatenate(list(made(3000))))
    assert GpuCandidates(index, None).limit == 2048


@pytest.mark.parametrize(
    ("factory", "cloned"),
    [
        ("Flat", False),
        ("SQfp16", False),
        ("HNSW16", False),
        ("IVF4,Flat", True),
        ("IVF4,SQ8", True),
        ("IVF4,PQ4", True),
        ("IVF4,PQ4x4fs", False),
        ("PCA8,IVF4,Flat", False),
    ],
)
def test_only_types_that_faiss_has_on_gpus_are_cloned(factory: str, cloned: bool) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    assert (gpu.clonable(index) is not None) is cloned


@pytest.mark.skipif(GPUS > 0, reason="faiss sees a GPU")
class TestWithoutGpu:
    def test_cuda_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"device cuda: .* this faiss sees no GPU; .*--search-device cpu"):
            placement(faiss.IndexFlatIP(DIM), made(10), "cuda")

    def test_auto_falls_back_to_the_cpu(self) -> None:
        placed = placement(faiss.IndexFlatIP(DIM), made(10), "auto")
        assert (placed.device, type(placed.candidates)) == ("cpu", CpuCandidates)
        assert "sees no GPU" in placed.why


class TestVectorsThatDoNotFit:
    @pytest.fixture(autouse=True)
    def _a_full_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "_free_bytes", lambda: [RESERVED + 100])

    @pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
    def test_cuda_is_refused_and_auto_falls_back_to_the_cpu(self, factory: str) -> None:
        embeddings = made(500)
        index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
        vectors_ND = np.concatenate(list(embeddings))
        index.train(vectors_ND)
        index.add(vectors_ND)
        with pytest.raises(UserError, match=r"500 vectors need .* GB, 1 GPU\(s\) have"):
            placement(index, embeddings, "cuda")
        placed = placement(index, embeddings, "auto")
        assert placed.device == "cpu"
        assert "500 vectors need" in placed.why


@on_a_gpu
@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF16,Flat", "IVF16,SQ8", "PQ4x4fs"])
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path, bundle: EmbeddingShards, factory: str) -> None:
    parameters = {**build_index(tmp_path, bundle, factory=factory).parameters, "nprobe": 16}
    cpu = EntityIndex.read(tmp_path / INDEX_FILE, bundle, parameters)
    found = EntityIndex.read(tmp_path / INDEX_FILE, bundle, parameters, "cuda")
    assert found.device == "cuda"
    rows_BK, scores_BK = found.search(queries(64), 10)
    expected_BK, _ = cpu.search(queries(64), 10)
    assert np.mean(rows_BK == expected_BK) > 0.95
    best_BI = queries(64) / np.linalg.norm(queries(64), axis=1, keepdims=True) @ np.concatenate(list(bundle)).T
    by_entity_BE = best_BI.reshape(64, 1500, 2).max(axis=2)
    np.testing.assert_allclose(scores_BK, np.take_along_axis(by_entity_BE, rows_BK, axis=1), atol=1e-5)
