"""Other ways to search the same embeddings: flat, faiss's HNSW and usearch, each from little effort to much.

Shapes: Q queries, n embeddings added at once, D the embedding width, K = 10 results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from usearch.index import Index as UsearchIndex

from benchmarks.index_probe import overlap
from benchmarks.measure import percentiles_ms
from core.runtime import faiss
from index.embeddings import Embeddings
from index.factory import one_thread
from index.tune import K

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Search = Callable[[Float32Array], Int64Array]  # queries to the positions of the nearest

_CONNECTIVITY = 32
_EFFORTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Peer(Protocol):
    """An index that embeddings are added to, with whole shards of them at a time."""

    def add(self, part_nD: Float32Array) -> None: ...

    def searches(self) -> Iterator[tuple[str, Search]]:
        """How to search what has been added, from little effort to much; each holds until the next is taken."""
        ...


class Flat:
    """Exact search over float16."""

    def __init__(self, dim: int, threads: int) -> None:
        self._index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)

    def add(self, part_nD: Float32Array) -> None:
        self._index.add(part_nD)

    def searches(self) -> Iterator[tuple[str, Search]]:
        yield "all", partial(_found, self._index)


class Hnsw:
    """faiss's HNSW over float16, 32 links an element and level."""

    def __init__(self, dim: int, threads: int) -> None:
        self._threads = threads
        self._index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, _CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)

    def add(self, part_nD: Float32Array) -> None:
        faiss.omp_set_num_threads(self._threads)
        if not self._index.is_trained:
            self._index.train(part_nD[:1000])
        self._index.add(part_nD)

    def searches(self) -> Iterator[tuple[str, Search]]:
        for effort in _EFFORTS:
            self._index.hnsw.efSearch = effort
            yield f"efSearch {effort}", partial(_found, self._index)


class Usearch:
    """usearch over float16, 32 links an element."""

    def __init__(self, dim: int, threads: int) -> None:
        self._threads = threads
        self._index = UsearchIndex(ndim=dim, metric="ip", dtype="f16", connectivity=_CONNECTIVITY)

    def add(self, part_nD: Float32Array) -> None:
        start = len(self._index)
        keys_n = np.arange(start, start + len(part_nD), dtype=np.uint64)
        self._index.add(keys_n, part_nD, threads=self._threads)

    def searches(self) -> Iterator[tuple[str, Search]]:
        def search(queries_QD: Float32Array) -> Int64Array:
            # `atleast_2d`: for one query it gives one row without its axis.
            return np.atleast_2d(np.asarray(self._index.search(queries_QD, K, threads=1).keys)).astype(np.int64)

        for effort in _EFFORTS:
            self._index.expansion_search = effort  # type: ignore[misc]  # it has a setter
            yield f"expansion {effort}", search


def _found(index: Any, queries_QD: Float32Array) -> Int64Array:
    return np.asarray(index.search(queries_QD, K)[1])


PEERS: dict[str, Callable[[int, int], Peer]] = {"flat": Flat, "HNSW32": Hnsw, "usearch": Usearch}  # of dim, threads


@dataclass(frozen=True)
class Asked:
    """What is asked when an index holds `size` embeddings, and the positions of the nearest."""

    size: int
    queries_QD: Float32Array
    truth_QK: Int64Array


def measure_growth(
    name: str, embeddings: Embeddings, stages: Sequence[Asked], *, threads: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """An index that grows from one stage to the next, each a whole number of shards but for the last: the seconds that
    building has taken so far, and at each effort recall@10 and the milliseconds of one query on one thread."""
    peer = PEERS[name](embeddings.dim, threads)
    parts = iter(embeddings)
    held, build_s = 0, 0.0
    for stage in stages:
        while held < stage.size:
            part_nD = next(parts)
            started = time.perf_counter()
            peer.add(part_nD)
            build_s += time.perf_counter() - started
            held += len(part_nD)
        assert held == stage.size, "a stage ends with a shard"
        yield {"build_s": round(build_s, 1), "points": [*_points(peer, stage, repeats)]}


def _points(peer: Peer, asked: Asked, repeats: int) -> Iterator[dict[str, Any]]:
    for effort, search in peer.searches():
        with one_thread():
            found_QK = np.concatenate([search(query_D[None]) for query_D in asked.queries_QD])
            taken = percentiles_ms(partial(_one, search, asked.queries_QD), repeats=repeats, warm_up=5)
        yield {"effort": effort, "recall_at_10": round(overlap(found_QK, asked.truth_QK), 4), **taken}


def _one(search: Search, queries_QD: Float32Array, number: int) -> Int64Array:
    return search(queries_QD[number % len(queries_QD)][None])
