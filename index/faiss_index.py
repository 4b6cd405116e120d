"""faiss indexes on the CPU: made from a factory string, trained, filled and searched.

Shapes: S vectors to train on, L lists, Q queries, F candidates, N embeddings, D embedding width.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array, Queries
from core.errors import UserError
from core.runtime import faiss
from index.embeddings import Embeddings

Parameters = Mapping[str, Any]  # of a search: `nprobe`, `efSearch`, `k_factor`

SEED = 1234
POINTS_PER_LIST = 40  # faiss warns below 39
_K_MEANS_ITERATIONS = 10
_MAX_POINTS_WITHOUT_LISTS = 100_000
_SOURCE_LOCATION = re.compile(r"^Error in .+? at \S+:\d+: (Error: )?")
_EFFORTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Candidates(Protocol):
    """Finds what may be nearest to a query.

    - `exact`: scores are cosines and nothing is missed.
    - `filters`: `search` respects `allowed_N`.
    - `limit`: the largest `count`.

    `search` returns scores float32 [Q, F], falling, and positions int64 [Q, F], padded with -1. Equal filters must be
    the same `allowed_N` bool [N] object. `effort` multiplies `nprobe` and `efSearch`.
    """

    exact: bool
    filters: bool
    limit: int

    def efforts(self) -> list[dict[str, float]]: ...

    def search(
        self, queries_QD: Queries, count: int, parameters: Parameters, allowed_N: BoolArray | None, effort: float
    ) -> tuple[Float32Array, Int64Array]: ...


class CpuCandidates:
    """`Candidates` from any faiss index on the CPU. Not thread-safe: some settings belong to the index."""

    def __init__(self, index: Any) -> None:
        self._index = index
        core = _core(index)
        self._ivf = core if isinstance(core, faiss.IndexIVF) else None
        self._hnsw = isinstance(core, faiss.IndexHNSW)
        self.exact = isinstance(faiss.downcast_index(index), faiss.IndexFlat)
        self.filters = not isinstance(core, (faiss.IndexPQ, faiss.IndexFastScan))  # these accept no selector
        self.limit = int(index.ntotal)
        self._selector: tuple[BoolArray, Any] | None = None

    def search(
        self, queries_QD: Queries, count: int, parameters: Parameters, allowed_N: BoolArray | None, effort: float
    ) -> tuple[Float32Array, Int64Array]:
        self._set_parallelism(len(queries_QD))
        selector = None if allowed_N is None or not self.filters else self._selector_of(allowed_N)
        settings = search_parameters(self._index, parameters, selector, effort)
        found: tuple[Float32Array, Int64Array] = self._index.search(np.asarray(queries_QD), count, params=settings)
        return found

    def efforts(self) -> list[dict[str, float]]:
        """Return search settings of rising effort, about 1.4 times each. One empty dict if there is no choice."""
        if self._ivf is not None:
            return list_efforts(self._ivf.nlist)
        if self._hnsw:
            return [{"efSearch": ef_search} for ef_search in _EFFORTS if 16 <= ef_search <= 1024]
        return [{}]

    def _set_parallelism(self, queries: int) -> None:
        """Split the lists of each query over the threads if there are fewer queries than threads, else the queries."""
        if self._ivf is None:
            return
        split_lists = queries < faiss.omp_get_max_threads()
        if isinstance(self._ivf, faiss.IndexIVFFastScan):
            self._ivf.implem = 14 if split_lists else 0
        else:
            self._ivf.parallel_mode = 1 if split_lists else 0

    def _selector_of(self, allowed_N: BoolArray) -> Any:
        if self._selector is None or self._selector[0] is not allowed_N:
            self._selector = (allowed_N, faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little")))
        return self._selector[1]


def list_efforts(lists: int) -> list[dict[str, float]]:
    """Return settings of rising effort for an index with lists. The last one visits all lists."""
    return [{"nprobe": float(nprobe)} for nprobe in (*(each for each in _EFFORTS if each < lists), lists)]


def search_parameters(index: Any, parameters: Parameters, selector: Any = None, effort: float = 1) -> Any:
    """Return faiss's search parameters for the index's type, or None if it takes none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, parameters, selector, effort)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, parameters, selector, effort)
        k_factor = float(parameters.get("k_factor", 10))
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
    selection: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        nprobe = min(effort * int(parameters.get("nprobe", 1)), index.nlist)
        return faiss.SearchParametersIVF(nprobe=math.ceil(nprobe), **selection)
    if isinstance(index, faiss.IndexHNSW):
        ef_search = min(effort * int(parameters.get("efSearch", 64)), index.ntotal)
        return faiss.SearchParametersHNSW(efSearch=math.ceil(ef_search), **selection)
    return faiss.SearchParameters(**selection) if selection else None


def untuned_parameters(index: Any) -> dict[str, Any]:
    """Return search parameters that favour recall."""
    parameters: dict[str, Any] = {}
    core = _core(index)
    if isinstance(faiss.downcast_index(index), faiss.IndexRefine):
        parameters["k_factor"] = 10
    if isinstance(core, faiss.IndexIVF):
        parameters["nprobe"] = max(1, round(2 * core.nlist**0.5))
    elif isinstance(core, faiss.IndexHNSW):
        parameters["efSearch"] = 128
    if isinstance(core, (faiss.IndexPQ, faiss.IndexIVFPQ, faiss.IndexFastScan, faiss.IndexIVFFastScan)):
        parameters["k_factor"] = 50
    return parameters


def factory_index(dim: int, factory: str) -> Any:
    """Return an empty inner-product index made from faiss's factory string. Raise `UserError` if faiss cannot."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = faiss_reason(error)
        raise UserError(
            f"faiss cannot make factory {factory!r} for width {dim} ({reason}); see faiss's guide to factory strings"
        ) from error


def faiss_reason(error: Exception) -> str:
    """Return faiss's message without its source location."""
    return _SOURCE_LOCATION.sub("", str(error).splitlines()[-1])


def visible_gpus() -> int:
    """Return how many GPUs faiss sees. The CPU wheel has the function, but it always returns 0."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def train(index: Any, embeddings: Embeddings, factory: str, gpus: int = 0) -> None:
    """Train an empty index on an evenly spaced sample. Raise `UserError` if faiss cannot."""
    if index.is_trained:
        return
    core = faiss.downcast_index(index)
    lists = faiss.extract_index_ivf(index).nlist if "IVF" in factory else 0
    size = min(len(embeddings), max(POINTS_PER_LIST * lists, _MAX_POINTS_WITHOUT_LISTS))
    sample_SD = embeddings.at(np.linspace(0, len(embeddings), size, endpoint=False).astype(np.int64))
    try:
        if isinstance(core, faiss.IndexIVF):
            if len(sample_SD) < lists:
                raise RuntimeError(f"{lists} lists need as many embeddings")
            core.quantizer.train(sample_SD)
            core.quantizer.add(centroids(sample_SD, lists, gpus=gpus))
        # Codebooks of 16 entries train so fast that threads mostly wait for each other, for minutes on a busy machine.
        tiny_codebooks = isinstance(core, (faiss.IndexFastScan, faiss.IndexIVFFastScan))
        with one_thread() if tiny_codebooks else nullcontext():
            index.train(sample_SD)
    except RuntimeError as error:
        reason = faiss_reason(error)
        raise UserError(
            f"factory {factory!r} cannot be trained on {len(sample_SD)} embeddings ({reason}); choose a smaller one"
        ) from error


def fill(index: Any, batches: Iterable[Float32Array]) -> None:
    """Add batches of embeddings to a trained index."""
    with exact_lists(index):
        for embeddings_nD in batches:
            index.add(embeddings_nD)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let faiss use one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@contextmanager
def exact_lists(index: Any) -> Iterator[None]:
    """Assign added vectors to lists by float32 centroids if the index has float16 ones.

    BLAS compares many vectors with float32 centroids far faster. A single query is faster with float16.
    """
    core = faiss.try_extract_index_ivf(index)
    if core is None or not isinstance(faiss.downcast_index(core.quantizer), faiss.IndexScalarQuantizer):
        yield
        return
    float16, owned = core.quantizer, core.own_fields
    float32 = faiss.IndexFlatIP(core.d)
    float32.add(float16.reconstruct_n(0, core.nlist))
    core.own_fields = False
    core.quantizer = float32
    try:
        yield
    finally:
        core.quantizer, core.own_fields = float16, owned


def centroids(sample_SD: Float32Array, lists: int, *, gpus: int = 0) -> Float32Array:
    """Return unit-length centroids [L, D] from spherical k-means."""
    k_means = faiss.Kmeans(
        sample_SD.shape[1], lists, niter=_K_MEANS_ITERATIONS, seed=SEED, spherical=True, gpu=gpus or False,
        min_points_per_centroid=1, max_points_per_centroid=len(sample_SD),
    )  # fmt: skip
    k_means.train(sample_SD)
    found: Float32Array = k_means.centroids
    return found


def _core(index: Any) -> Any:
    """Return the index inside transforms and refinement."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _core(index.base_index)
    return index
