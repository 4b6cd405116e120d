"""What may be nearest to a query, by faiss on one GPU or several.

Exact search over float16 where the vectors fit, and that for any index, since it needs none. An IVF index that faiss
has on GPUs is taken as it is. Each GPU holds a share. What is decided before a GPU is touched is tested without one.

Shapes: Q queries, F candidates, N embeddings, n those of a block, D the embedding width.
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import UserError
from core.runtime import faiss, usable_cores
from index.embeddings import BoolArray, Embeddings, Float32Array, Int64Array
from index.faiss_index import Candidates, CpuCandidates, faiss_reason, list_efforts, visible_gpus

SCRATCH_BYTES = 2 * 1024**3  # of each GPU for faiss's intermediate results
RESERVED_BYTES = 2 * 1024**3  # of each GPU for ONNX Runtime, whose arena grows with the batches
_BLOCK_BYTES = 4 * 1024**3  # in main memory at a time, float32, while the GPUs are filled
_FILLING_THREADS = 8  # at most
# Blocks of a GPU, at least, and the vectors that make another one worth it. faiss has one thread block choose the best
# of a query's scores: a single block of vectors leaves most of a GPU idle.
_BLOCKS, _LEAST_IN_BLOCK = 8, 50_000
_MOST = 2048  # results, and lists looked at, of one query: more a GPU does not give
_MODE_IDS_MODULO = 1  # faiss's `shard_type`: each GPU gets every n-th vector of each list


class NotOnGpuError(Exception):
    """Why an index cannot be searched on the GPUs of this machine."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an index is searched, and why there."""

    candidates: Candidates
    device: str
    why: str


class GpuCandidates:
    """`Candidates` of an index on GPUs. One thread owns it: faiss's GPU resources take no two at a time.

    Scores are of float16 and of sums in another order, so `EntityIndex` orders what is found anew, by what is stored.
    """

    exact = close = False
    filters = False

    def __init__(self, index: Any, lists: int | None, resources: Sequence[Any] = ()) -> None:
        """`lists` of an IVF index, None where everything is looked at; `resources` live as long as this."""
        self._index = index
        self._lists = lists
        self._resources = tuple(resources)
        self.limit = min(_MOST, int(index.ntotal))

    def efforts(self) -> list[dict[str, float]]:
        return [{}] if self._lists is None else list_efforts(min(self._lists, _MOST))

    def search(
        self,
        queries_QD: Float32Array,
        count: int,
        parameters: Mapping[str, Any],
        allowed_N: BoolArray | None,
        effort: float,
    ) -> tuple[Float32Array, Int64Array]:
        settings = None
        if self._lists is not None:
            nprobe = min(effort * int(parameters.get("nprobe", 1)), self._lists, _MOST)
            settings = faiss.SearchParametersIVF(nprobe=math.ceil(nprobe))
        found: tuple[Float32Array, Int64Array] = self._index.search(queries_QD, count, params=settings)
        return found


def placement(index: Any, embeddings: Embeddings, device: str) -> Placement:
    """Put an index where `device` (`auto`, `cpu`, `cuda`) says; `auto` takes the CPU where the GPUs cannot have it.

    Raises `UserError` for `cuda` where they cannot, saying why.
    """
    if device == "cpu":
        return Placement(candidates=CpuCandidates(index), device="cpu", why="as asked for")
    try:
        free_bytes = _free_bytes()
        if (ivf := clonable(index)) is not None:
            return _placed_ivf(ivf, free_bytes)
        return _placed_flat(embeddings, free_bytes)
    except NotOnGpuError as reason:
        if device == "cuda":
            raise UserError(
                f"device cuda: the index cannot be searched there: {reason}; see to that, or search on the CPU with "
                "--search-device cpu"
            ) from reason
        return Placement(candidates=CpuCandidates(index), device="cpu", why=str(reason))


def clonable(index: Any) -> Any | None:
    """An IVF index of a kind that faiss has on GPUs, None for all others."""
    index = faiss.downcast_index(index)
    return index if type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ) else None


def shares(free_bytes: Sequence[int], count: int, bytes_each: int) -> list[int]:
    """How many of `count` vectors each GPU takes, in proportion to what it has room for.

    Raises `NotOnGpuError` where they do not fit beside what is kept for the encoder and for scratch.
    """
    rooms = _rooms(free_bytes, bytes_each)
    if sum(rooms) < count:
        raise NotOnGpuError(_too_large(free_bytes, count, bytes_each))
    ends = [count * sum(rooms[: number + 1]) // sum(rooms) for number in range(len(rooms))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def equal_shares(free_bytes: Sequence[int], count: int, bytes_each: int, bytes_fixed: int) -> list[int]:
    """The GPUs, as many as have room for an equal share of `count` vectors and `bytes_fixed`. Raises as `shares`."""
    rooms = _rooms([free - bytes_fixed for free in free_bytes], bytes_each)
    best_first = sorted(range(len(rooms)), key=lambda gpu: -rooms[gpu])
    for gpus in range(len(rooms), 0, -1):
        if rooms[best_first[gpus - 1]] >= math.ceil(count / gpus):
            return sorted(best_first[:gpus])
    raise NotOnGpuError(_too_large(free_bytes, count, bytes_each))


def sharded_flat(
    embeddings: Embeddings, held: Sequence[int], new_block: Callable[[int], Any], block_bytes: int = _BLOCK_BYTES
) -> Any:
    """An exact index whose first `held[0]` vectors lie on the first GPU, and so on; `new_block(gpu)` is an empty one.

    On a GPU they lie in blocks, each filled at once: faiss makes room for what is added in one call, and copies all it
    has for what comes later. All are searched side by side, each by a thread of its own.
    """
    whole = faiss.IndexShards(embeddings.dim, len(held) > 1, True)
    sizes = [_block_sizes(count, embeddings.dim, block_bytes) for count in held]
    blocks = _blocks(embeddings, [size for each in sizes for size in each])
    for gpu, each in enumerate(sizes):
        of_gpu = faiss.IndexShards(embeddings.dim, True, True)
        for _ in each:
            block = new_block(gpu)
            block.add(next(blocks))
            of_gpu.add_shard(block)
        if each:
            whole.add_shard(of_gpu)
    return whole


def _block_sizes(count: int, dim: int, block_bytes: int = _BLOCK_BYTES) -> list[int]:
    """How the `count` vectors of a GPU are shared out into blocks of at most `block_bytes` as float32."""
    most = max(1, block_bytes // (4 * dim))
    blocks = max(math.ceil(count / most), min(_BLOCKS, count // _LEAST_IN_BLOCK), 1)
    size = min(most, math.ceil(count / blocks))
    return [min(size, count - start) for start in range(0, count, size)] if count else []


def _blocks(embeddings: Embeddings, sizes: Sequence[int]) -> Iterator[Float32Array]:
    """All embeddings in order, in blocks [n, D] of those sizes; each is gone when the next is asked for."""
    buffer_nD = np.empty((max(sizes, default=0), embeddings.dim), np.float32)
    parts = _parts_ahead(embeddings)
    rest_nD = buffer_nD[:0]
    for size in sizes:
        filled = 0
        while filled < size:
            if not len(rest_nD):
                rest_nD = next(parts)
            taken_nD = rest_nD[: size - filled]
            buffer_nD[filled : filled + len(taken_nD)] = taken_nD
            filled, rest_nD = filled + len(taken_nD), rest_nD[len(taken_nD) :]
        yield buffer_nD[:size]


def _parts_ahead(embeddings: Embeddings) -> Iterator[Float32Array]:
    """The parts of embeddings in order. Threads read and normalise the next ones meanwhile, which for one alone takes
    longer than all else about filling a GPU."""
    waiting: deque[Future[Float32Array]] = deque()
    threads = min(_FILLING_THREADS, usable_cores())
    with ThreadPoolExecutor(threads) as pool:
        for number in range(embeddings.parts):
            waiting.append(pool.submit(embeddings.part, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _placed_flat(embeddings: Embeddings, free_bytes: Sequence[int]) -> Placement:
    # float16 and, as faiss keeps it, a vector's norm.
    held = shares(free_bytes, len(embeddings), 2 * embeddings.dim + 4)
    scratch_bytes = [SCRATCH_BYTES // max(1, len(_block_sizes(count, embeddings.dim))) for count in held]
    resources = []

    def new_block(gpu: int) -> Any:
        # Of its own, since a thread of its own searches it: a stream of work, and a share of the scratch.
        resources.append(_resources(scratch_bytes[gpu]))
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, True
        return faiss.GpuIndexFlatIP(resources[-1], embeddings.dim, config)

    with _failures_told():
        index = sharded_flat(embeddings, held, new_block)
    why = f"exact over float16 on {sum(count > 0 for count in held)} GPU(s)"
    return Placement(candidates=GpuCandidates(index, None, resources), device="cuda", why=why)


def _placed_ivf(index: Any, free_bytes: Sequence[int]) -> Placement:
    # A vector's code and id, and a quarter more: lists grow in steps. Each GPU has all centroids.
    gpus = equal_shares(free_bytes, index.ntotal, math.ceil(1.25 * (index.code_size + 8)), 4 * index.d * index.nlist)
    resources = [_resources(SCRATCH_BYTES) for _ in gpus]
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.shard_type = True, _MODE_IDS_MODULO
    options.useFloat16 = True
    options.allowCpuCoarseQuantizer = True  # where the lists are found by HNSW
    with _failures_told():
        if len(gpus) == 1:
            cloned = faiss.index_cpu_to_gpu(resources[0], gpus[0], index, options)
        else:
            cloned = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, gpus)
    why = f"IVF on {len(gpus)} GPU(s)"
    return Placement(candidates=GpuCandidates(cloned, int(index.nlist), resources), device="cuda", why=why)


@contextmanager
def _failures_told() -> Iterator[None]:
    """What faiss throws while a GPU is filled, as the reason why it cannot be."""
    try:
        yield
    except RuntimeError as error:
        raise NotOnGpuError(faiss_reason(error)) from error


def _resources(scratch_bytes: int) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(scratch_bytes)
    return resources


def _rooms(free_bytes: Sequence[int], bytes_each: int) -> list[int]:
    return [max(0, free - SCRATCH_BYTES - RESERVED_BYTES) // bytes_each for free in free_bytes]


def _too_large(free_bytes: Sequence[int], count: int, bytes_each: int) -> str:
    spare = sum(max(0, free - SCRATCH_BYTES - RESERVED_BYTES) for free in free_bytes)
    return (
        f"{count} vectors take {count * bytes_each / 1e9:.1f} GB, {len(free_bytes)} GPU(s) have {spare / 1e9:.1f} GB "
        f"to spare beside {(SCRATCH_BYTES + RESERVED_BYTES) / 1e9:.1f} GB each for the encoder and for scratch"
    )


def _free_bytes() -> list[int]:
    """What each GPU that faiss sees has free now, in faiss's order. Raises `NotOnGpuError` where there is none."""
    gpus = visible_gpus()
    if gpus == 0:
        raise NotOnGpuError("this faiss sees no GPU; its extra is `gpu`")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotOnGpuError(f"the CUDA driver does not load ({error})") from error
    return [_free_of(driver, gpu) for gpu in range(gpus)]


def _free_of(driver: ctypes.CDLL, gpu: int) -> int:
    """By the driver: faiss does not tell. Its numbering is that of the CUDA runtime, `CUDA_VISIBLE_DEVICES` heeded."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    steps: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), gpu),
        lambda: driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        lambda: driver.cuCtxPushCurrent_v2(context),
        lambda: driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        lambda: driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())),
        lambda: driver.cuDevicePrimaryCtxRelease_v2(device),
    )
    for step in steps:
        if (status := step()) != 0:
            raise NotOnGpuError(f"GPU {gpu} does not tell its free memory (CUDA error {status})")
    return free.value
