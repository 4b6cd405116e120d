"""Searching on GPUs: decisions without a GPU, and equality with the CPU on machines that have one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from core.errors import UserError
from index import gpu
from index.build import build_index
from index.embeddings import Embeddings, EmbeddingShards, write_shard
from index.faiss_index import CpuCandidates, one_thread
from index.gpu import GpuCandidates, NotOnGpuError, equal_shares, placement
from index.manifest import INDEX_FILE
from index.search import EntityIndex

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
    assert GpuCandidates(index, 1).limit == 2048


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


class Nvml(ModuleType):
    """The part of nvidia-ml-py that is used, with made-up GPUs."""

    class NVMLError(Exception):
        pass

    def __init__(self, free_bytes: dict[str, int]) -> None:
        super().__init__("pynvml")
        self.free_bytes = free_bytes
        self.error = ""

    def nvmlInit(self) -> None:  # noqa: N802 - the library's names
        if self.error:
            raise self.NVMLError(self.error)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.free_bytes)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:  # noqa: N802
        return list(self.free_bytes)[number]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.free_bytes:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(free=self.free_bytes[handle])


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    """A machine with three GPUs."""
    machine = Nvml({"GPU-a": 10, "GPU-b": 20, "GPU-c": 30})
    monkeypatch.setitem(sys.modules, "pynvml", machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return machine


class TestFreeMemory:
    @pytest.mark.parametrize(
        ("visible", "free"), [(None, [10, 20, 30]), ("2,0", [30, 10]), ("GPU-b, 0", [20, 10]), ("1", [20])]
    )
    def test_it_is_that_of_the_visible_gpus_in_their_order(
        self, nvml: Nvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, free: list[int]
    ) -> None:
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu._free_bytes() == free

    def test_no_gpu_is_visible(self, nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        placed = placement(faiss.IndexFlatIP(DIM), made(10), "auto")
        assert (placed.device, placed.why) == ("cpu", "there is no GPU, or its driver does not work (Not Found)")

    def test_without_a_driver_cuda_is_refused_and_auto_falls_back_to_the_cpu(self, nvml: Nvml) -> None:
        nvml.error = "NVML Shared Library Not Found"
        with pytest.raises(UserError, match=r"device cuda: .* Library Not Found\); .*--search-device cpu"):
            placement(faiss.IndexFlatIP(DIM), made(10), "cuda")
        placed = placement(faiss.IndexFlatIP(DIM), made(10), "auto")
        assert (placed.device, type(placed.candidates)) == ("cpu", CpuCandidates)

    def test_without_the_extra_the_reason_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        assert "its extra is `gpu`" in placement(faiss.IndexFlatIP(DIM), made(10), "auto").why


@pytest.mark.skipif(GPUS > 0, reason="faiss sees a GPU")
@pytest.mark.parametrize(("factory", "library"), [("Flat", "onnxruntime"), ("IVF4,Flat", "faiss")])
def test_wheels_without_cuda_are_named(monkeypatch: pytest.MonkeyPatch, factory: str, library: str) -> None:
    monkeypatch.setattr(gpu, "_free_bytes", lambda: [RESERVED + 10**6])
    placed = placement(faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT), made(10), "auto")
    assert placed.device == "cpu"
    assert f"this {library}" in placed.why


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
