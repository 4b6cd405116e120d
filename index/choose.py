"""Which index a bundle should have, by measurement on a sample of its own embeddings.

Shapes: N embeddings, S of them in the sample, D the embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from core.errors import UserError
from index.candidates import CpuCandidates
from index.embeddings import Embeddings
from index.factory import SEED, factory_index, fill, train
from index.search import EntityIndex
from index.tune import QUERIES, K, Point, cheapest, curve, exact_positions, held_out_queries

SAMPLE = 100_000
_SHRINKS = 4  # the smaller sample that growth is told from
_LEAST_FOR_LISTS = 20_000
_HNSW_BYTES = 2 * 32 * 4 + 16  # an element's links


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What an index must do at full size: p50 of one query on one thread, ann recall@10, size when loaded."""

    budget_ms: float = 5.0
    recall: float = 0.98
    memory_gb: float = 8.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A kind of index. `factory(n)` is its factory string for n embeddings, `bytes(n)` about what it holds.

    `linear`: it looks at every embedding, so its time is a line through two sizes; else a power of the size.
    """

    factory: Callable[[int], str]
    bytes: Callable[[int], float]
    linear: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A factory, why it was chosen, and what was measured and expected of each candidate, in order."""

    factory: str
    why: str
    candidates: tuple[Mapping[str, Any], ...]


def choose(embeddings: Embeddings, targets: Targets, *, progress: bool = False) -> Choice:
    """The cheapest index that is expected to meet `targets` over all `embeddings`.

    Exact search where that does; else the first of the others that does, so the rest are not measured. What is measured
    on two samples is extended to full size: a line where every embedding is looked at, else a power of the size. Raises
    `UserError` where none meets the targets, saying what each would take.
    """
    count = len(embeddings)
    if count <= K:
        return Choice(factory="Flat", why=f"auto: exact search over {count} embeddings", candidates=())
    sample = min(count, SAMPLE)
    seen: list[dict[str, Any]] = []
    for candidate in tqdm(candidates(count, embeddings.dim), desc="measure", unit="index", disable=not progress):
        entry: dict[str, Any] = {"factory": candidate.factory(count), "memory_gb": candidate.bytes(count) / 1e9}
        seen.append(entry)
        if entry["memory_gb"] > targets.memory_gb:
            entry["verdict"] = "takes too much memory; not measured"
            continue
        sizes = sorted({sample // _SHRINKS, sample}) if count > sample else [sample]
        curves = {size: _measure(candidate, embeddings, size, targets.recall) for size in sizes}
        entry["curves"] = {str(size): [asdict(point) for point in points] for size, points in curves.items()}
        best = {size: cheapest(points, targets.recall) for size, points in curves.items()}
        found = {size: point for size, point in best.items() if point is not None}
        if len(found) < len(sizes):
            entry["verdict"] = f"does not reach a recall of {targets.recall}"
            continue
        entry["expected_p50_ms"] = round(
            expected_ms({s: p.p50_ms for s, p in found.items()}, count, candidate.linear), 3
        )
        if entry["expected_p50_ms"] > targets.budget_ms:
            entry["verdict"] = "takes too long"
            continue
        entry["verdict"] = "chosen"
        return Choice(
            factory=entry["factory"],
            why=f"auto: of the indexes expected to meet recall {targets.recall}, {targets.budget_ms:g} ms and "
            f"{targets.memory_gb:g} GB the first of: exact, lists of codes, codes, graph",
            candidates=tuple(seen),
        )
    reasons = "; ".join(f"{each['factory']} {_shortfall(each)}" for each in seen)
    raise UserError(
        f"no index is expected to meet recall {targets.recall}, {targets.budget_ms:g} ms and {targets.memory_gb:g} GB "
        f"({reasons}); allow more with --budget-ms or --memory-gb, ask for less --recall, or name one with --factory"
    )


def candidates(count: int, dim: int) -> list[Candidate]:
    """Exact search, then codes, in lists and without, then a graph: it holds every embedding and its links.

    float16 is what a bundle stores, so nothing is lost in it; float32 is for a CPU that is slow to widen it. Lists take
    a fraction of the time of codes alone and heed a filter.
    """
    found = [
        Candidate(factory=lambda n: "SQfp16", bytes=lambda n: 2.0 * dim * n, linear=True),
        Candidate(factory=lambda n: "Flat", bytes=lambda n: 4.0 * dim * n, linear=True),
    ]
    # What the candidates are ordered by in the end is stored with the bundle.
    if dim % 8 == 0 and count >= _LEAST_FOR_LISTS:
        found.append(
            Candidate(
                # Lists are found by looking at all centroids: of a graph over them (HNSW) a third was reached. A code
                # is of the residual, the embedding less its centroid, 4 bits for 2 numbers: so good an estimate that
                # few embeddings are read, each of them from somewhere else.
                factory=lambda n: f"IVF{lists(n)}(SQfp16),PQ{dim // 2}x4fsr",
                bytes=lambda n: (dim / 4 + 8) * n + lists(n) * 2 * dim,
                linear=False,
            )
        )
    if dim % 8 == 0:
        # All of them are looked at: 4 bits for 4 numbers.
        found.append(Candidate(factory=lambda n: f"PQ{dim // 4}x4fs", bytes=lambda n: dim / 8 * n, linear=True))
    found.append(Candidate(factory=lambda n: "HNSW32", bytes=lambda n: (4 * dim + _HNSW_BYTES) * n, linear=False))
    return found


def lists(count: int) -> int:
    """How many lists: four times the root of the embeddings, as a power of two. Each query looks at all centroids."""
    return int(2 ** round(math.log2(4 * math.sqrt(count))))


def expected_ms(p50_ms: Mapping[int, float], count: int, linear: bool) -> float:
    """The time at `count` embeddings from that at one size or two. It is never taken to fall with the size."""
    (small, at_small), (large, at_large) = min(p50_ms.items()), max(p50_ms.items())
    if small == large:
        return at_large
    if linear:
        per_embedding = max(at_large - at_small, 0.0) / (large - small)
        return at_large + per_embedding * (count - large)
    power = max(math.log(at_large / at_small) / math.log(large / small), 0.0)
    return float(at_large * (count / large) ** power)


def _measure(candidate: Candidate, embeddings: Embeddings, size: int, recall: float) -> list[Point]:
    drawn = np.random.default_rng(SEED).permutation(len(embeddings))
    # Held out where there are enough; a query is moved off the embedding that it is made of in any case.
    queries_QD = held_out_queries(embeddings, drawn[-QUERIES:], SEED)
    sample = Embeddings(embeddings.dim, [embeddings.stored(np.sort(drawn[:size]))], [np.arange(size)])
    index = factory_index(sample.dim, candidate.factory(size))
    train(index, sample, candidate.factory(size))
    fill(index, sample)
    searched = EntityIndex(CpuCandidates(index), sample, {})
    return curve(searched, queries_QD, exact_positions(sample, queries_QD), recall)


def _shortfall(entry: Mapping[str, Any]) -> str:
    if "expected_p50_ms" in entry:
        return f"{entry['expected_p50_ms']:.1f} ms"
    return f"{entry['memory_gb']:.1f} GB" if "curves" not in entry else "too little recall"
