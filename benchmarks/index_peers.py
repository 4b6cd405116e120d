"""Other ways to search the same embeddings: flat, faiss's HNSW and usearch, each from little effort to much.

Shapes: Q queries, D the embedding width, K = 10 results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from usearch.index import Index as UsearchIndex

from benchmarks.index_probe import overlap
from benchmarks.timing import percentiles_ms
from index.embeddings import Embeddings
from index.factory import one_thread
from index.tune import K

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Search = Callable[[Float32Array], Int64Array]  # queries to the positions of the nearest

_CONNECTIVITY = 32
_EFFORTS = (16, 32, 64, 128, 256, 512)


def flat(embeddings: Embeddings, threads: int) -> Iterator[tuple[str, Search]]:
    """Exact search over float16."""
    index = faiss.IndexScalarQuantizer(embeddings.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for part_nD in embeddings:
        index.add(part_nD)
    yield "all", partial(_found, index)


def hnsw(embeddings: Embeddings, threads: int) -> Iterator[tuple[str, Search]]:
    """faiss's HNSW over float16, 32 links an element and level."""
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWSQ(embeddings.dim, faiss.ScalarQuantizer.QT_fp16, _CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings.at(np.arange(min(1000, len(embeddings)))))
    for part_nD in embeddings:
        index.add(part_nD)
    for effort in _EFFORTS:
        index.hnsw.efSearch = effort
        yield f"efSearch {effort}", partial(_found, index)


def usearch(embeddings: Embeddings, threads: int) -> Iterator[tuple[str, Search]]:
    """usearch over float16, 32 links an element."""
    index = UsearchIndex(ndim=embeddings.dim, metric="ip", dtype="f16", connectivity=_CONNECTIVITY)
    start = 0
    for part_nD in embeddings:
        index.add(np.arange(start, start + len(part_nD), dtype=np.uint64), part_nD, threads=threads)
        start += len(part_nD)

    def search(queries_QD: Float32Array) -> Int64Array:
        # `atleast_2d`: for one query it gives one row without its axis.
        return np.atleast_2d(np.asarray(index.search(queries_QD, K, threads=1).keys)).astype(np.int64)

    for effort in _EFFORTS:
        index.expansion_search = effort  # type: ignore[misc]  # it has a setter
        yield f"expansion {effort}", search


def _found(index: Any, queries_QD: Float32Array) -> Int64Array:
    return np.asarray(index.search(queries_QD, K)[1])


PEERS: dict[str, Callable[[Embeddings, int], Iterator[tuple[str, Search]]]] = {
    "flat": flat,
    "HNSW32": hnsw,
    "usearch": usearch,
}


def measure_peer(
    name: str, embeddings: Embeddings, queries_QD: Float32Array, truth_QK: Int64Array, *, threads: int, repeats: int
) -> dict[str, Any]:
    """Seconds to build, and at each effort recall@10 and the milliseconds of one query on one thread."""
    started = time.perf_counter()
    points: list[dict[str, Any]] = []
    build_s = 0.0
    for effort, search in PEERS[name](embeddings, threads):
        build_s = build_s or round(time.perf_counter() - started, 1)
        with one_thread():
            found_QK = np.concatenate([search(query_D[None]) for query_D in queries_QD])
            taken = percentiles_ms(partial(_one, search, queries_QD), repeats=repeats, warm_up=5)
        points.append({"effort": effort, "recall_at_10": round(overlap(found_QK, truth_QK), 4), **taken})
    return {"build_s": build_s, "points": points}


def _one(search: Search, queries_QD: Float32Array, number: int) -> Int64Array:
    return search(queries_QD[number % len(queries_QD)][None])
