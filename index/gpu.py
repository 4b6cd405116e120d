"""Where an index is searched: on the CPU, or on one GPU or several if it fits. Each GPU holds a share.

IVF indexes of the types that faiss has on GPUs are cloned there. Any other index is replaced by exact search with
`index.graph`.

Shapes: Q queries, F candidates, N embeddings, D embedding width.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.arrays import BoolArray, Device, Float32Array, Int64Array, Queries
from core.errors import MissingExtra, UserError, WikiclipError, first_line
from core.runtime import faiss
from index.embeddings import Embeddings
from index.faiss_index import Candidates, CpuCandidates, Parameters, faiss_reason, list_efforts, visible_gpus

SCRATCH_BYTES = 2 * 1024**3  # per GPU, for intermediate results of a search
RESERVED_BYTES = 2 * 1024**3  # per GPU, for the encoder, whose memory grows with the batches
_WARM_UP_QUERIES = 32
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
    """`Candidates` from an IVF index on GPUs. Not thread-safe: nor are faiss's GPU resources.

    Scores come from float16 values summed in another order. `EntityIndex` computes them again from stored vectors.
    """

    exact = filters = False

    def __init__(self, index: Any, lists: int, resources: Sequence[Any] = ()) -> None:
        """`resources` must live as long as the index."""
        self._index = index
        self._lists = lists
        self._resources = tuple(resources)
        self.limit = min(_MAX_RESULTS, int(index.ntotal))

    def efforts(self) -> list[dict[str, float]]:
        return list_efforts(min(self._lists, _MAX_RESULTS))

    def search(
        self, queries_QD: Queries, count: int, parameters: Parameters, allowed_N: BoolArray | None, effort: float
    ) -> tuple[Float32Array, Int64Array]:
        nprobe = min(effort * int(parameters.get("nprobe", 1)), self._lists, _MAX_RESULTS)
        settings = faiss.SearchParametersIVF(nprobe=math.ceil(nprobe))
        found: tuple[Float32Array, Int64Array] = self._index.search(np.asarray(queries_QD), count, params=settings)
        return found


def placement(index: Any, embeddings: Embeddings, device: str) -> Placement:
    """Place an index on `device` (`auto`, `cpu`, `cuda`, or `graph`: `index.graph` on the CPU).

    `auto` falls back to the CPU. Raise `UserError` if `cuda` is not possible, `MissingExtra` for `graph` without onnx.
    """
    if device == "cpu":
        return Placement(candidates=CpuCandidates(index), device="cpu", why="as asked for")
    if device == "graph":
        candidates = _graph_candidates(embeddings, [Device("cpu")])
        return Placement(candidates=candidates, device="cpu", why="the graph, as asked for")
    try:
        free_bytes = _free_bytes()
        if (ivf := clonable(index)) is not None:
            return _place_ivf(ivf, free_bytes)
        return _place_flat(embeddings, free_bytes)
    except (NotOnGpuError, MissingExtra, RuntimeError) as error:  # faiss raises RuntimeError
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


def _place_flat(embeddings: Embeddings, free_bytes: Sequence[int]) -> Placement:
    gpus = equal_shares(free_bytes, len(embeddings), 2 * embeddings.dim)  # float16
    try:
        candidates = _graph_candidates(embeddings, [Device("cuda", gpu) for gpu in gpus])
        # Allocate the memory for a batch now, not at the first request.
        candidates.search(np.zeros((_WARM_UP_QUERIES, embeddings.dim), np.float32), 1, {}, None, 1.0)
    except WikiclipError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise NotOnGpuError(first_line(error)) from error
    return Placement(candidates=candidates, device="cuda", why=f"exact over float16 on {len(gpus)} GPU(s)")


def _graph_candidates(embeddings: Embeddings, devices: Sequence[Device]) -> Candidates:
    from index.graph import GraphCandidates  # loads ONNX Runtime, which the other kinds of search do not need

    return GraphCandidates(embeddings, devices)


def _place_ivf(index: Any, free_bytes: Sequence[int]) -> Placement:
    # A code and an id per vector, and a quarter more because lists grow in steps. Each GPU has all centroids.
    gpus = equal_shares(free_bytes, index.ntotal, math.ceil(1.25 * (index.code_size + 8)), 4 * index.d * index.nlist)
    if visible_gpus() != len(free_bytes):
        raise NotOnGpuError(f"this faiss sees {visible_gpus()} of {len(free_bytes)} GPU(s); its extra is `gpu`")
    resources = [faiss.StandardGpuResources() for _ in gpus]
    for each in resources:
        each.setTempMemory(SCRATCH_BYTES)
    options = faiss.GpuMultipleClonerOptions()
    options.shard, options.shard_type = True, _MODE_IDS_MODULO
    options.useFloat16 = True
    options.allowCpuCoarseQuantizer = True  # if HNSW finds the lists
    cloned = faiss.index_cpu_to_gpu_multiple_py(resources, index, options, gpus)
    why = f"IVF on {len(gpus)} GPU(s)"
    return Placement(candidates=GpuCandidates(cloned, int(index.nlist), resources), device="cuda", why=why)


def _free_bytes() -> list[int]:
    """Return the free memory of each visible GPU, in CUDA's order. Raise `NotOnGpuError` if there is none."""
    try:
        import pynvml
    except ModuleNotFoundError as error:
        raise NotOnGpuError("nvidia-ml-py is not installed; its extra is `gpu`") from error
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(pynvml.nvmlDeviceGetCount()) if visible is None else visible.split(",")
        return [pynvml.nvmlDeviceGetMemoryInfo(_gpu(str(name).strip())).free for name in names]
    except pynvml.NVMLError as error:
        raise NotOnGpuError(f"there is no GPU, or its driver does not work ({error})") from error


def _gpu(name: str) -> Any:
    """Return NVML's handle of a GPU by its number or UUID, as in `CUDA_VISIBLE_DEVICES`."""
    import pynvml

    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
