"""Choose a faiss index and its search parameters by measurement on the bundle's own embeddings.

Shapes: N embeddings, S of them in a sample, Q queries, K = 10 results, F candidates, D embedding width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from core.arrays import Float32Array, Int64Array
from core.errors import UserError
from core.runtime import faiss
from index.embeddings import Embeddings
from index.faiss_index import SEED, CpuCandidates, factory_index, fill, one_thread, train
from index.search import EntityIndex

K = 10
SAMPLE = 100_000
_SMALL_SAMPLE = SAMPLE // 4  # the time at both sizes shows how it grows
QUERIES = 1000
QUERY_COSINE = 0.8  # of a synthetic query to the embedding that it is made from
_DIRECTIONS_SEED = 1
_TIMED_QUERIES = 100
_TOO_SLOW = 1.3  # times the fastest point that reaches the recall: more effort only takes longer
_K_FACTORS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300)
_MIN_FOR_LISTS = 20_000  # embeddings
_HNSW_LINK_BYTES = 2 * 32 * 4 + 16  # per embedding


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What an index must achieve at full size: p50 of one query on one thread, ann_recall@10, size when loaded."""

    budget_ms: float = 5.0
    recall: float = 0.98
    memory_gb: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kind of index: `factory(n)` is its factory string for n embeddings, `bytes(n)` its approximate size.

    `linear` means that a search visits every embedding, so its time is linear in their number.
    """

    factory: Callable[[int], str]
    bytes: Callable[[int], float]
    linear: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """Search parameters with their recall@10 against exact search and their median time of one query."""

    parameters: Mapping[str, float]
    recall: float
    standard_error: float
    p50_ms: float = math.nan

    def reaches(self, recall: float) -> bool:
        """Return whether the recall is reached with a margin of two standard errors."""
        return self.recall - 2 * self.standard_error >= recall


def choose(
    embeddings: Embeddings, targets: Targets, *, progress: bool = False
) -> tuple[str, str, list[dict[str, Any]]]:
    """Return the factory of the first candidate that is expected to meet `targets` over all `embeddings`.

    Also return why it was chosen, and what was measured of each candidate, in order.
    The candidates are ordered by preference, and those after the chosen one are not measured. Times at two sample sizes
    are extrapolated to full size. Raise `UserError` if no candidate meets the targets.
    """
    count = len(embeddings)
    if count <= K:
        return "Flat", f"auto: exact search over {count} embeddings", []
    assessed: list[dict[str, Any]] = []
    for candidate in tqdm(candidates(count, embeddings.dim), desc="measure", unit="index", disable=not progress):
        assessed.append(_assess(candidate, embeddings, targets))
        if assessed[-1]["verdict"] == "chosen":
            why = (
                f"auto: of the indexes expected to meet recall {targets.recall}, {targets.budget_ms:g} ms and "
                f"{targets.memory_gb:g} GB the first of: exact, lists of codes, codes, graph"
            )
            return assessed[-1]["factory"], why, assessed
    reasons = "; ".join(f"{each['factory']} {each['verdict']}" for each in assessed)
    raise UserError(
        f"no index is expected to meet recall {targets.recall}, {targets.budget_ms:g} ms and {targets.memory_gb:g} GB "
        f"({reasons}); allow more with --budget-ms or --memory-gb, ask for less --recall, or name one with --factory"
    )


def candidates(count: int, dim: int) -> list[Candidate]:
    """Return exact search, then quantised codes in lists and without lists, then a graph.

    float16 loses nothing, because a bundle stores float16. float32 is for CPUs that convert slowly. Lists take a
    fraction of the time of codes alone and support filters. HNSW holds every embedding and its links.
    """
    found = [
        Candidate(factory=lambda n: "SQfp16", bytes=lambda n: 2.0 * dim * n, linear=True),
        Candidate(factory=lambda n: "Flat", bytes=lambda n: 4.0 * dim * n, linear=True),
    ]
    if dim % 8 == 0 and count >= _MIN_FOR_LISTS:
        found.append(
            Candidate(
                # The lists to visit are found by comparing all centroids. HNSW over the centroids found a third of
                # them. A code of 4 bits for 2 numbers describes the residual, the embedding minus its centroid. Its
                # estimate is so good that few embeddings must be read from disk to order the results.
                factory=lambda n: f"IVF{lists(n)}(SQfp16),PQ{dim // 2}x4fsr",
                bytes=lambda n: (dim / 4 + 8) * n + lists(n) * 2 * dim,
                linear=False,
            )
        )
    if dim % 8 == 0:  # 4 bits for 4 numbers
        found.append(Candidate(factory=lambda n: f"PQ{dim // 4}x4fs", bytes=lambda n: dim / 8 * n, linear=True))
    found.append(Candidate(factory=lambda n: "HNSW32", bytes=lambda n: (4 * dim + _HNSW_LINK_BYTES) * n, linear=False))
    return found


def lists(count: int) -> int:
    """Return the number of lists: four times the square root of the number of embeddings, as a power of two."""
    return int(2 ** round(math.log2(4 * math.sqrt(count))))


def expected_ms(p50_ms: Mapping[int, float], count: int, linear: bool) -> float:
    """Extrapolate the time from one or two sizes to `count` embeddings. It never falls with the size."""
    (small, at_small), (large, at_large) = min(p50_ms.items()), max(p50_ms.items())
    if small == large:
        return at_large
    if linear:
        per_embedding = max(at_large - at_small, 0.0) / (large - small)
        return at_large + per_embedding * (count - large)
    power = max(math.log(at_large / at_small) / math.log(large / small), 0.0)
    return float(at_large * (count / large) ** power)


def _assess(candidate: Candidate, embeddings: Embeddings, targets: Targets) -> dict[str, Any]:
    """Return the candidate's measurements, expectations and verdict."""
    count = len(embeddings)
    entry: dict[str, Any] = {"factory": candidate.factory(count), "memory_gb": candidate.bytes(count) / 1e9}
    if entry["memory_gb"] > targets.memory_gb:
        return {**entry, "verdict": f"takes {entry['memory_gb']:.1f} GB"}
    sizes = [_SMALL_SAMPLE, SAMPLE] if count > SAMPLE else [count]
    curves = {size: _measure(candidate, embeddings, size, targets.recall) for size in sizes}
    entry["curves"] = {str(size): [asdict(point) for point in points] for size, points in curves.items()}
    p50_ms = {size: point.p50_ms for size in sizes if (point := cheapest(curves[size], targets.recall)) is not None}
    if len(p50_ms) < len(sizes):
        return {**entry, "verdict": f"does not reach a recall of {targets.recall}"}
    entry["expected_p50_ms"] = round(expected_ms(p50_ms, count, candidate.linear), 3)
    chosen = entry["expected_p50_ms"] <= targets.budget_ms
    return {**entry, "verdict": "chosen" if chosen else f"takes {entry['expected_p50_ms']:.1f} ms"}


def _measure(candidate: Candidate, embeddings: Embeddings, size: int, recall: float) -> list[Point]:
    order = np.random.default_rng(SEED).permutation(len(embeddings))
    queries_QD = held_out_queries(embeddings, order[-QUERIES:], SEED)
    sample = Embeddings(embeddings.dim, [embeddings.stored(np.sort(order[:size]))], [np.arange(size)])
    index = factory_index(sample.dim, candidate.factory(size))
    train(index, sample, candidate.factory(size))
    fill(index, sample)
    return curve(EntityIndex(CpuCandidates(index), sample, {}), queries_QD, exact_positions(sample, queries_QD), recall)


def held_out_queries(embeddings: Embeddings, positions_Q: Int64Array, seed: int) -> Float32Array:
    """Return synthetic queries [Q, D] at cosine 0.8 to the embeddings at some positions.

    The offset is the difference of two other embeddings: real images vary in the same directions.
    """
    rng = np.random.default_rng((seed, _DIRECTIONS_SEED))  # independent of positions drawn with the same seed
    one, other = (embeddings.at(rng.integers(len(embeddings), size=len(positions_Q))) for _ in range(2))
    at_QD = embeddings.at(positions_Q)
    away_QD = one - other
    away_QD -= np.sum(away_QD * at_QD, axis=1, keepdims=True) * at_QD
    away_QD /= np.maximum(np.linalg.norm(away_QD, axis=1, keepdims=True), 1e-6)
    return np.asarray(QUERY_COSINE * at_QD + math.sqrt(1 - QUERY_COSINE**2) * away_QD, np.float32)


def exact_positions(embeddings: Embeddings, queries_QD: Float32Array) -> Int64Array:
    """Return the positions [Q, K] of each query's nearest embeddings, in one pass over all."""
    from faiss.contrib.exhaustive_search import knn_ground_truth

    k = min(K, len(embeddings))
    positions_QK: Int64Array = knn_ground_truth(queries_QD, iter(embeddings), k, faiss.METRIC_INNER_PRODUCT, ngpu=0)[1]
    return positions_QK


def curve(index: EntityIndex, queries_QD: Float32Array, truth_QK: Int64Array, recall: float) -> list[Point]:
    """Measure rising `nprobe` or `efSearch`, each with the smallest `k_factor` that reaches the recall.

    If none does, the smallest with about the highest recall counts. Stop when more effort only takes longer. Times are
    of one query on one thread.
    """
    points: list[Point] = []
    for effort in index.candidates.efforts():
        point = _point(index, queries_QD, truth_QK, effort, recall)
        points.append(replace(point, p50_ms=_p50_ms(index, queries_QD, point.parameters)))
        best = cheapest(points, recall)
        if best is not None and points[-1].p50_ms > _TOO_SLOW * best.p50_ms:
            break
    return points


def cheapest(points: Sequence[Point], recall: float) -> Point | None:
    """Return the fastest point that reaches the recall, if any."""
    return min((point for point in points if point.reaches(recall)), key=lambda point: point.p50_ms, default=None)


def _point(
    index: EntityIndex, queries_QD: Float32Array, truth_QK: Int64Array, effort: Mapping[str, float], recall: float
) -> Point:
    """Return an untimed point for an effort and the smallest sufficient `k_factor`."""
    exact = index.candidates.exact
    k_factors = (1,) if exact else _K_FACTORS
    count = min(k_factors[-1] * K, index.candidates.limit)
    _, positions_QF = index.candidates.search(queries_QD, count, effort, None, 1)
    is_true_QKF = positions_QF[:, None] == truth_QK[:, :, None]
    rank_QK = np.where(is_true_QKF.any(axis=2), is_true_QKF.argmax(axis=2), np.inf)  # from 0, of each true position
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
    highest = points[-1]
    return next(point for point in points if point.recall >= highest.recall - highest.standard_error)


def _p50_ms(index: EntityIndex, queries_QD: Float32Array, parameters: Mapping[str, float]) -> float:
    times_s: list[float] = []
    with one_thread():
        for query_D in queries_QD[:_TIMED_QUERIES]:
            started = time.perf_counter()
            index.search(query_D[None], K, parameters)
            times_s.append(time.perf_counter() - started)
    return round(1000 * float(np.median(times_s)), 3)
