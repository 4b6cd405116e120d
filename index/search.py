"""Search for the best entities of each query. An entity has the score of its best image, or of the mean of its images.

Remembered vectors, where a bundle has them, can only raise a score.

Shapes: B queries, K entities asked for, F candidates fetched, A allowed embeddings, N embeddings, E entities, I images
of an entity, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np

from core.arrays import BoolArray, DeviceArray, Float32Array, Int64Array, Queries, normalised
from core.errors import BundleAltered
from core.runtime import faiss
from index.embeddings import Embeddings, concatenate_ranges
from index.faiss_index import Candidates, faiss_reason
from index.gpu import placement
from index.remembered import Remembered
from index.store import Selection

Ranked = tuple[Int64Array, Float32Array]  # entity rows and their falling cosines

DEFAULT_K_FACTOR = 6.4  # times the entities asked for are fetched and then ordered exactly
_MIN_FETCH = 10  # `k_factor` is tuned for ten results
_MAX_SCANNED = 10_000  # with so few allowed embeddings, scanning all is exact and faster than a filtered index


class _Allowed(NamedTuple):
    """A filter by position, `mask_N` bool [N] (None: all), and how many embeddings and entities pass it."""

    mask_N: BoolArray | None
    embeddings: int
    entities: int


class EntityIndex:
    """An index over the embeddings of a bundle. One thread must own it: faiss is not thread-safe."""

    def __init__(
        self,
        candidates: Candidates,
        embeddings: Embeddings,
        parameters: Mapping[str, Any],
        *,
        device: str = "cpu",
        why: str = "as asked for",
        remembered: Remembered | None = None,
    ) -> None:
        """`device` and `why` say where `candidates` are found, and why there."""
        self.candidates = candidates
        self.remembered = remembered
        self.device, self.device_why = device, why
        self._embeddings = embeddings
        self._parameters = dict(parameters)
        self._rows_N = embeddings.rows_N
        self.entity_count = _count_distinct(self._rows_N)
        self._all = _Allowed(None, len(self._rows_N), self.entity_count)
        self._images_each = math.ceil(len(self._rows_N) / max(self.entity_count, 1))
        self._rescorer = faiss.IndexScalarQuantizer(
            embeddings.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        self._allowed: WeakKeyDictionary[Selection, _Allowed] = WeakKeyDictionary()

    @classmethod
    def read(
        cls,
        path: Path,
        embeddings: Embeddings,
        parameters: Mapping[str, Any],
        device: str = "cpu",
        remembered: Remembered | None = None,
    ) -> Self:
        """Memory-map an index file, or load it on GPUs if `device` (`auto`, `cpu`, `cuda`) says so.

        Raise `BundleAltered` if the file is not an index of these embeddings, `UserError` if `cuda` is not possible.
        """
        try:
            # Mapped if faiss can, so that processes share one copy.
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise BundleAltered(
                f"{path} is not an index ({faiss_reason(error)}); build it again with `wikiclip index`"
            ) from error
        if index.d != embeddings.dim or index.ntotal != len(embeddings):
            raise BundleAltered(
                f"the index holds {index.ntotal} embeddings of width {index.d}, the bundle {len(embeddings)} "
                f"of width {embeddings.dim}; build it again with `wikiclip index`"
            )
        placed = placement(index, embeddings, device)
        where = {"device": placed.device, "why": placed.why}
        return cls(placed.candidates, embeddings, parameters, remembered=remembered, **where)

    def __len__(self) -> int:
        return len(self._rows_N)

    def search(
        self,
        query_embeddings_BD: Queries,
        top_k: int,
        parameters: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """Return the best `top_k` entities of each query: rows int64 [B, K] and falling cosines float32 [B, K].

        Queries need not be normalised. With fewer entities, row -1 and score 0 pad. Equal scores are in row order. All
        entities of `selection` can be found. `parameters` (`nprobe`, `efSearch`, `k_factor`) override the bundle's.
        """
        queries_BD = query_embeddings_BD
        if not (isinstance(queries_BD, DeviceArray) and self.candidates.exact):
            queries_BD = normalised(np.ascontiguousarray(queries_BD))
        allowed = self._all if selection is None else self._allowed_by(selection)
        count = min(top_k, allowed.entities)
        ranked: list[Ranked] = []
        if count and allowed.mask_N is not None and allowed.embeddings <= _MAX_SCANNED:
            ranked = self._scan(_on_host(queries_BD), allowed)
        elif count:
            ranked = self._search_candidates(queries_BD, count, allowed, {**self._parameters, **(parameters or {})})
        rows_BK = np.full((len(queries_BD), top_k), -1, np.int64)
        scores_BK = np.zeros((len(queries_BD), top_k), np.float32)
        for query, (rows, scores) in enumerate(ranked):
            rows_BK[query, : len(rows)], scores_BK[query, : len(rows)] = rows[:top_k], scores[:top_k]
        if self.remembered is not None:
            allowed_M = self.remembered.allowed_by(selection)
            return self.remembered.merge(_on_host(queries_BD), rows_BK, scores_BK, allowed_M)
        return rows_BK, scores_BK

    def images_of(self, row: int) -> Float32Array:
        """Return the embeddings [I, D] of an entity's images. Thread-safe."""
        return self._embeddings.images_of(row)

    def _search_candidates(
        self, queries_BD: Queries, count: int, allowed: _Allowed, settings: Mapping[str, Any]
    ) -> list[Ranked]:
        """Fetch candidates, and twice as many for those queries whose candidates have too few entities."""
        candidates, mask_N = self.candidates, allowed.mask_N
        k_factor = float(settings.get("k_factor", DEFAULT_K_FACTOR))
        fetch = count if candidates.exact else math.ceil(k_factor * max(count, _MIN_FETCH))
        # A second search costs as much as the first. Rounding may swap the last results with the next candidates.
        fetch = max(fetch, count * self._images_each + _MIN_FETCH)
        scarcity = len(self) / allowed.embeddings
        if candidates.filters:
            effort = math.sqrt(scarcity)  # allowed embeddings are farther away
        else:
            fetch, effort = math.ceil(scarcity * fetch), 1.0
        ranked: dict[int, Ranked] = {}
        while len(ranked) < len(queries_BD):
            pending = [query for query in range(len(queries_BD)) if query not in ranked]
            last = fetch >= candidates.limit
            fetch = min(fetch, candidates.limit)
            queries_QD = queries_BD if not ranked else _on_host(queries_BD)[pending]
            scores_QF, positions_QF = candidates.search(
                queries_QD, fetch, settings, mask_N, math.inf if fetch == len(self) else effort
            )
            for query, scores_F, positions_F in zip(pending, scores_QF, positions_QF, strict=True):
                found_F = positions_F >= 0
                if mask_N is not None and not candidates.filters:
                    found_F &= mask_N[positions_F]
                best = self._best(_on_host(queries_BD)[query], positions_F[found_F], scores_F[found_F], count)
                # There may be too few: images of one entity fill the candidates, or a filter removes most of them.
                if len(best[0]) >= count:
                    ranked[query] = best
                elif last:
                    (ranked[query],) = self._scan(_on_host(queries_BD)[query : query + 1], allowed)
            fetch, effort = 2 * fetch, 2 * effort
        return [ranked[query] for query in range(len(queries_BD))]

    def _scan(self, queries_BD: Float32Array, allowed: _Allowed) -> list[Ranked]:
        """Rank all allowed entities exactly."""
        positions_A = np.arange(len(self)) if allowed.mask_N is None else np.flatnonzero(allowed.mask_N)
        scores_BA = np.empty((len(queries_BD), len(positions_A)), np.float32)
        for start in range(0, len(positions_A), _MAX_SCANNED):
            part = slice(start, start + _MAX_SCANNED)
            scores_BA[:, part] = queries_BD @ self._embeddings.at(positions_A[part]).T
        return [self._rank(positions_A, scores_A) for scores_A in scores_BA]

    def _best(self, query_D: Float32Array, positions_F: Int64Array, scores_F: Float32Array, count: int) -> Ranked:
        """Rank the entities of candidates by exact cosines."""
        if self.candidates.exact:
            return self._rank(positions_F, scores_F)
        stored_FD = self._embeddings.stored(positions_F)
        self._rescorer.reset()
        self._rescorer.add_sa_codes(stored_FD.view(np.uint8))
        scores_1F, places_1F = self._rescorer.search(query_D[None], len(positions_F))
        places_F = places_1F[0]
        # These scores are cosines of rounded vectors, so a few more entities are compared exactly.
        enough = 2 * count + _MIN_FETCH
        if len(self) == self.entity_count:
            places_F = places_F[:enough]
            return self._rank(positions_F[places_F], normalised(stored_FD[places_F]) @ query_D)
        # The best image of an entity need not be among the candidates.
        rows, _ = self._rank(positions_F[places_F], scores_1F[0])
        positions_F = self._all_images(np.sort(rows[:enough]))
        return self._rank(positions_F, self._embeddings.at(positions_F) @ query_D)

    def _rank(self, positions_F: Int64Array, scores_F: Float32Array) -> Ranked:
        """Return each entity once, with its best score, best first."""
        rows_F = self._rows_N[positions_F]
        order_F = np.lexsort((rows_F, -scores_F))
        rows_F, scores_F = rows_F[order_F], scores_F[order_F]
        first_F = np.sort(np.unique(rows_F, return_index=True)[1])
        return rows_F[first_F], np.minimum(scores_F[first_F], np.float32(1.0))  # rounding must not give 1.0000001

    def _all_images(self, rows_E: Int64Array) -> Int64Array:
        """Return the positions of all embeddings of some entities, in order."""
        starts_E, ends_E = np.searchsorted(self._rows_N, rows_E, "left"), np.searchsorted(self._rows_N, rows_E, "right")
        return concatenate_ranges(starts_E, ends_E)

    def _allowed_by(self, selection: Selection) -> _Allowed:
        if (cached := self._allowed.get(selection)) is not None:
            return cached
        mask_N = selection.allowed_E[self._rows_N]
        allowed = _Allowed(mask_N, int(np.count_nonzero(mask_N)), _count_distinct(self._rows_N[mask_N]))
        self._allowed[selection] = allowed
        return allowed


def _on_host(queries_BD: Queries) -> Float32Array:
    return queries_BD if isinstance(queries_BD, np.ndarray) else normalised(np.asarray(queries_BD))


def _count_distinct(sorted_rows_N: Int64Array) -> int:
    return int(np.count_nonzero(np.diff(sorted_rows_N, prepend=-1)))
