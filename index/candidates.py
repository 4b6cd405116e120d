"""What may be nearest to a query, by a faiss index on the CPU, with the fastest settings for one query and for many.

Shapes: Q queries, F candidates, N embeddings, D the embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core.runtime import faiss

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_EFFORTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Candidates(Protocol):
    """`exact`: scores are cosines and nothing is missed. `close`: they are, but for rounding to float16. `filters`:
    `allowed_N` is heeded. `limit`: the most it gives.

    `search` gives scores float32 [Q, F] that fall and positions int64 [Q, F], padded by -1. `allowed_N` bool [N] is one
    and the same object for one and the same selection. `effort` multiplies `nprobe` and `efSearch`.
    """

    exact: bool
    close: bool
    filters: bool
    limit: int

    def efforts(self) -> list[dict[str, float]]: ...

    def search(
        self,
        queries_QD: Float32Array,
        count: int,
        parameters: Mapping[str, Any],
        allowed_N: BoolArray | None,
        effort: float,
    ) -> tuple[Float32Array, Int64Array]: ...


class CpuCandidates:
    """`Candidates` of any index that faiss has on the CPU. One thread owns it: some settings are the index's own."""

    def __init__(self, index: Any) -> None:
        self._index = index
        core = _core(index)
        self._ivf = core if isinstance(core, faiss.IndexIVF) else None
        self._hnsw = isinstance(core, faiss.IndexHNSW)
        self._fast_scan_ivf = core if isinstance(core, faiss.IndexIVFFastScan) else None
        whole = faiss.downcast_index(index)
        self.exact = isinstance(whole, faiss.IndexFlat)
        self.close = isinstance(whole, faiss.IndexScalarQuantizer) and whole.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        self.filters = not isinstance(core, (faiss.IndexPQ, faiss.IndexFastScan))  # faiss refuses a selector there
        self.limit = int(index.ntotal)
        self._selector: tuple[BoolArray, Any] | None = None

    def search(
        self,
        queries_QD: Float32Array,
        count: int,
        parameters: Mapping[str, Any],
        allowed_N: BoolArray | None,
        effort: float,
    ) -> tuple[Float32Array, Int64Array]:
        self._set_parallelism(len(queries_QD))
        selector = None if allowed_N is None or not self.filters else self._selector_of(allowed_N)
        settings = search_parameters(self._index, parameters, selector, effort)
        found: tuple[Float32Array, Int64Array] = self._index.search(queries_QD, count, params=settings)
        return found

    def efforts(self) -> list[dict[str, float]]:
        """Settings of rising effort, about 1.4 times each the one before; one empty one where there is no choice."""
        if self._ivf is not None:
            return list_efforts(self._ivf.nlist)
        if self._hnsw:
            return [{"efSearch": ef_search} for ef_search in _EFFORTS if 16 <= ef_search <= 1024]
        return [{}]

    def _set_parallelism(self, queries: int) -> None:
        """Where queries are fewer than threads, the threads share the lists of each; else they share the queries."""
        if self._ivf is None:
            return
        split_lists = queries < faiss.omp_get_max_threads()
        if self._fast_scan_ivf is not None:
            self._fast_scan_ivf.implem = 14 if split_lists else 0
        else:
            self._ivf.parallel_mode = 1 if split_lists else 0

    def _selector_of(self, allowed_N: BoolArray) -> Any:
        if self._selector is None or self._selector[0] is not allowed_N:
            self._selector = (allowed_N, faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little")))
        return self._selector[1]


def list_efforts(lists: int) -> list[dict[str, float]]:
    """Settings of rising effort for so many lists, the last one looking at all."""
    return [{"nprobe": float(nprobe)} for nprobe in (*(each for each in _EFFORTS if each < lists), lists)]


def search_parameters(index: Any, parameters: Mapping[str, Any], selector: Any = None, effort: float = 1) -> Any:
    """faiss's per-call parameters for a kind of index, None where it takes none. Unused ones are left out."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, parameters, selector, effort)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, parameters, selector, effort)
        k_factor = float(parameters.get("k_factor", 10))
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
    given: dict[str, Any] = {} if selector is None else {"sel": selector}
    if isinstance(index, faiss.IndexIVF):
        nprobe = min(effort * int(parameters.get("nprobe", 1)), index.nlist)
        return faiss.SearchParametersIVF(nprobe=math.ceil(nprobe), **given)
    if isinstance(index, faiss.IndexHNSW):
        ef_search = min(effort * int(parameters.get("efSearch", 64)), index.ntotal)
        return faiss.SearchParametersHNSW(efSearch=math.ceil(ef_search), **given)
    return faiss.SearchParameters(**given) if given else None


def _core(index: Any) -> Any:
    """The index that does the work, inside transforms and refinement."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _core(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _core(index.base_index)
    return index
