"""Search on one GPU or several with faiss.

IVF indexes of the types that faiss has on GPUs are cloned there. Any other index is replaced by exact search over
float16 vectors, if they fit. Each GPU holds a share. Decisions are separate from GPU calls, so that tests without a GPU
cover them.

Shapes: Q queries, F candidates, N embeddings, n those of a block, D embedding width.
"""

import ctypes
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array
from core.errors import UserError
from core.runtime import faiss, usable_cores
from index.embeddings import Embeddings
from index.faiss_index import Candidates, CpuCandidates, Parameters, faiss_reason, list_efforts, visible_gpus

SCRATCH_BYTES = 2 * 1024**3  # per GPU, for faiss's intermediate results
RESERVED_BYTES = 2 * 1024**3  # per GPU, for ONNX Runtime, whose arena grows with the batches
_BLOCK_BYTES = 4 * 1024**3  # of float32 in main memory at a time, while GPUs are filled
_MAX_FILLING_THREADS = 8
# faiss selects the best scores of a query in one thread block, so a single block of vectors leaves most of a GPU idle.
_BLOCKS, _MIN_BLOCK = 8, 50_000  # per GPU, and vectors that justify another block
_MAX_RESULTS = 2048  # results, and lists visited, per query on a GPU
_MODE_IDS_MODULO = 1  # faiss's `shard_type`: each GPU gets every n-th vector of each list


class NotOnGpuError(Exception):
    """The reason why an index cannot be searched on this machine's GPUs."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an index is searched, and why."""

    candidates: Candidates
    device: str
    why: str


class GpuCandidates:
    """`Candidates` from an index on GPUs. Not thread-safe: nor are faiss's GPU resources.

    Scores come from float16 values summed in another order. `EntityIndex` computes them again from stored vectors.
    """

    exact = filters = False

    def __init__(self, index: Any, lists: int | None, resources: Sequence[Any] = ()) -> None:
        """`lists` is None for exact search. `resources` must live as long as the index."""
        self._index = index
        self._lists = lists
        self._resources = tuple(resources)
        self.limit = min(_MAX_RESULTS, int(index.ntotal))

    def efforts(self) -> list[dict[str, float]]:
        return [{}] if self._lists is None else list_efforts(min(self._lists, _MAX_RESULTS))

    def search(
        self, queries_QD: Float32Array, count: int, parameters: Parameters, allowed_N: BoolArray | None, effort: float
    ) -> tuple[Float32Array, Int64Array]:
        settings = None
        if self._lists is not None:
            nprobe = min(effort * int(parameters.get("nprobe", 1)), self._lists, _MAX_RESULTS)
            settings = faiss.SearchParametersIVF(nprobe=math.ceil(nprobe))
        found: tuple[Float32Array, Int64Array] = self._index.search(queries_QD, count, params=settings)
        return found


def placement(index: Any, embeddings: Embeddings, device: str) -> Placement:
    """Place an index on `device` (`auto`, `cpu`, `cuda`). `auto` falls back to the CPU.

    Raise `UserError` if `cuda` is not possible.
    """
    if device == "cpu":
        return Placement(candidates=CpuCandidates(index), device="cpu", why="as asked for")
    try:
        free_bytes = _free_bytes()
        if (ivf := clonable(index)) is not None:
            return _place_ivf(ivf, free_bytes)
        return _place_flat(embeddings, free_bytes)
    except (NotOnGpuError, RuntimeError) as error:  # faiss raises RuntimeError
        reason = faiss_reason(error)
        if device == "cuda":
            raise UserError(
                f"device cuda: the index cannot be searched there: {reason}; fix that, or search on the CPU with "
                "--search-device cpu"
            ) from error
        return Placement(candidates=CpuCandidates(index), device="cpu", why=reason)


def clonable(index: Any) -> Any | None:
    """Return an IVF index of a type that faiss has on GPUs, None for any other index."""
    index = faiss.downcast_index(index)
    return index if type(index) in (faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQ) else None


def equal_shares(free_bytes: Sequence[int], count: int, bytes_each: int, bytes_fixed: int = 0) -> list[int]:
    """Return as many GPUs as have room for an equal share and `bytes_fixed`. Raise `NotOnGpuError`."""
    available = [max(0, free - SCRATCH_BYTES - RESERVED_BYTES) for free in free_bytes]
    rooms = [max(0, free - bytes_fixed) // bytes_each for free in available]
    best_first = sorted(range(len(rooms)), key=lambda gpu: -rooms[gpu])
    for gpus in range(len(rooms), 0, -1):
        if rooms[best_first[gpus - 1]] >= math.ceil(count / gpus):
            return sorted(best_first[:gpus])
    raise NotOnGpuError(
        f"{count} vectors need {count * bytes_each / 1e9:.1f} GB, {len(free_bytes)} GPU(s) have "
        f"{sum(available) / 1e9:.1f} GB left after {(SCRATCH_BYTES + RESERVED_BYTES) / 1e9:.1f} GB each for the "
        "encoder and scratch"
    )


def sharded_flat(
    embeddings: Embeddings, counts: Sequence[int], new_block: Callable[[int], Any], block_bytes: int = _BLOCK_BYTES
) -> Any:
    """Return an exact index with the first `counts[0]` vectors on the first GPU, and so on.

    `new_block(number)` makes an empty index on one of them. Each block is filled in one call, because faiss would copy
    it for a second one. Each is searched by its own thread.
    """
    whole = faiss.IndexShards(embeddings.dim, len(counts) > 1, True)
    sizes = [_block_sizes(count, embeddings.dim, block_bytes) for count in counts]
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
    """Divide the vectors of a GPU into blocks of at most `block_bytes` as float32."""
    largest = max(1, block_bytes // (4 * dim))
    blocks = max(math.ceil(count / largest), min(_BLOCKS, count // _MIN_BLOCK), 1)
    size = min(largest, math.ceil(count / blocks))
    return [min(size, count - start) for start in range(0, count, size)] if count else []


def _blocks(embeddings: Embeddings, sizes: Sequence[int]) -> Iterator[Float32Array]:
    """Yield all embeddings in blocks [n, D] of those sizes. A block is valid until the next one."""
    buffer_nD = np.empty((max(sizes, default=0), embeddings.dim), np.float32)
    parts = _prefetched_parts(embeddings)
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


def _prefetched_parts(embeddings: Embeddings) -> Iterator[Float32Array]:
    """Yield the parts. Threads read and normalise the next ones, which is the slowest step of filling a GPU."""
    pending: deque[Future[Float32Array]] = deque()
    threads = min(_MAX_FILLING_THREADS, usable_cores())
    with ThreadPoolExecutor(threads) as pool:
        for number in range(embeddings.parts):
            pending.append(pool.submit(embeddings.part, number))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _place_flat(embeddings: Embeddings, free_bytes: Sequence[int]) -> Placement:
    gpus = equal_shares(free_bytes, len(embeddings), 2 * embeddings.dim + 4)  # float16, and faiss stores a norm
    counts = [(len(embeddings) + number) // len(gpus) for number in range(len(gpus))]
    scratch_bytes = SCRATCH_BYTES // max(1, len(_block_sizes(counts[-1], embeddings.dim)))
    resources = []

    def new_block(number: int) -> Any:
        # Each block has its own thread, so it needs its own stream and share of the scratch memory.
        resources.append(_resources(scratch_bytes))
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpus[number], True
        return faiss.GpuIndexFlatIP(resources[-1], embeddings.dim, config)

    index = sharded_flat(embeddings, counts, new_block)
    why = f"exact over float16 on {len(gpus)} GPU(s)"
    return Placement(candidates=GpuCandidates(index, None, resources), device="cuda", why=why)


def _place_ivf(index: Any, free_bytes: Sequence[int]) -> Placement:
    # A code and an id per vector, and a quarter more because lists grow in steps. Each GPU has all centroids.
    gpus = equal_shares(free_bytes, index.ntotal, math.ceil(1.25 * (index.code_size + 8)), 4 * index.d * index.nlist)
    resources = [_resources(SCRATCH_BYTES) for _ in gpus]
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.shard_type = True, _MODE_IDS_MODULO
    options.useFloat16 = True
    options.allowCpuCoarseQuantizer = True  # if HNSW finds the lists
    cloned = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, gpus)
    why = f"IVF on {len(gpus)} GPU(s)"
    return Placement(candidates=GpuCandidates(cloned, int(index.nlist), resources), device="cuda", why=why)


def _resources(scratch_bytes: int) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(scratch_bytes)
    return resources


def _free_bytes() -> list[int]:
    """Return the free memory of each GPU, in faiss's order. Raise `NotOnGpuError` if there is none.

    faiss has no call for it, so it comes from the CUDA driver, which numbers GPUs as the CUDA runtime does.
    """
    gpus = visible_gpus()
    if gpus == 0:
        raise NotOnGpuError("this faiss sees no GPU; its extra is `gpu`")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise NotOnGpuError(f"the CUDA driver does not load ({error})") from error
    return [_free_bytes_of(driver, gpu) for gpu in range(gpus)]


def _free_bytes_of(driver: ctypes.CDLL, gpu: int) -> int:
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
            raise NotOnGpuError(f"the free memory of GPU {gpu} cannot be read (CUDA error {status})")
    return free.value
