"""How far an index must look for the recall asked for, and what that takes.

Shapes: Q queries, D the embedding width, K = 10 results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from core.runtime import faiss
from index.embeddings import Embeddings
from index.factory import one_thread
from index.search import EntityIndex

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

K = 10
QUERIES = 1000
QUERY_COSINE = 0.8  # of a made-up query and the embedding that it is made of
_DIRECTIONS = 1
_TIMED = 100
_ONLY_COSTS = 1.3
_K_FACTORS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to search: its parameters, its recall@10 against exact search, its median time for one query."""

    parameters: Mapping[str, float]
    recall: float
    standard_error: float
    p50_ms: float = math.nan

    def reaches(self, recall: float) -> bool:
        """Whether the recall is reached with two standard errors to spare, so that other queries find it, too."""
        return self.recall - 2 * self.standard_error >= recall


def held_out_queries(embeddings: Embeddings, positions_Q: Int64Array, seed: int) -> Float32Array:
    """Queries [Q, D] near the embeddings at some positions, but off them as images are.

    Each is moved along the difference of two other embeddings, which is how embeddings vary, to a cosine of 0.8.
    """
    # A stream of its own: whoever drew the positions by the same seed must not be given them again.
    rng = np.random.default_rng((seed, _DIRECTIONS))
    one, other = (embeddings.at(rng.integers(len(embeddings), size=len(positions_Q))) for _ in range(2))
    at_QD = embeddings.at(positions_Q)
    away_QD = one - other
    away_QD -= np.sum(away_QD * at_QD, axis=1, keepdims=True) * at_QD
    away_QD /= np.maximum(np.linalg.norm(away_QD, axis=1, keepdims=True), 1e-6)
    return np.asarray(QUERY_COSINE * at_QD + math.sqrt(1 - QUERY_COSINE**2) * away_QD, np.float32)


def exact_positions(embeddings: Embeddings, queries_QD: Float32Array) -> Int64Array:
    """The positions [Q, K] of the embeddings nearest to each query, in one pass over them all."""
    k = min(K, len(embeddings))
    from faiss.contrib.exhaustive_search import knn_ground_truth

    positions_QK: Int64Array = knn_ground_truth(queries_QD, iter(embeddings), k, faiss.METRIC_INNER_PRODUCT, ngpu=0)[1]
    return positions_QK


def curve(index: EntityIndex, queries_QD: Float32Array, truth_QK: Int64Array, recall: float) -> list[Point]:
    """Ever more `nprobe` or `efSearch`, each with the least `k_factor` that gives the recall, until it only costs.

    Where none gives it, with the least that gives about the most. Times are of one query on one thread.
    """
    points: list[Point] = []
    for effort in index.candidates.efforts():
        point = _point(index, queries_QD, truth_QK, effort, recall)
        points.append(replace(point, p50_ms=_p50_ms(index, queries_QD, point.parameters)))
        best = cheapest(points, recall)
        if best is not None and points[-1].p50_ms > _ONLY_COSTS * best.p50_ms:
            break
    return points


def cheapest(points: Sequence[Point], recall: float) -> Point | None:
    """The quickest of those that reach a recall, None where none does."""
    return min((point for point in points if point.reaches(recall)), key=lambda point: point.p50_ms, default=None)


def _point(
    index: EntityIndex, queries_QD: Float32Array, truth_QK: Int64Array, effort: Mapping[str, float], recall: float
) -> Point:
    """An effort with the least `k_factor` that reaches the recall, or that gives about the most; not yet timed."""
    exact = index.candidates.exact
    k_factors = (1,) if exact else _K_FACTORS
    count = min(k_factors[-1] * K, index.candidates.limit)
    _, positions_QF = index.candidates.search(queries_QD, count, effort, None, 1)
    rank_QK = np.array([_ranks(*pair) for pair in zip(positions_QF, truth_QK, strict=True)])
    points: list[Point] = []
    for k_factor in k_factors:
        share_Q = np.mean(rank_QK < k_factor * K, axis=1)
        points.append(
            Point(
                parameters=effort if exact else {**effort, "k_factor": k_factor},
                recall=float(share_Q.mean()),
                standard_error=float(share_Q.std() / math.sqrt(len(share_Q))),
            )
        )
        if points[-1].reaches(recall):
            return points[-1]
    most = points[-1]
    return next(point for point in points if point.recall >= most.recall - most.standard_error)


def _ranks(positions_F: Int64Array, wanted_K: Int64Array) -> npt.NDArray[np.float64]:
    """Where each of the wanted positions stands among those found, from 0; infinity where it does not."""
    equal_KF = positions_F == wanted_K[:, None]
    return np.where(equal_KF.any(axis=1), equal_KF.argmax(axis=1), np.inf)


def _p50_ms(index: EntityIndex, queries_QD: Float32Array, parameters: Mapping[str, float]) -> float:
    taken_s: list[float] = []
    with one_thread():
        for query_D in queries_QD[:_TIMED]:
            started = time.perf_counter()
            index.search(query_D[None], K, parameters)
            taken_s.append(time.perf_counter() - started)
    return round(1000 * float(np.median(taken_s)), 3)
