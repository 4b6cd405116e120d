"""Search over entity embeddings: the best entities of each query, an entity once, at its best image.

Shapes: B queries, K entities asked for, F candidates fetched, N embeddings, D the embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import numpy as np

from core.errors import BundleAltered
from core.runtime import faiss
from index.embeddings import BoolArray, Embeddings, EmbeddingShards, Float32Array, Int64Array, normalised
from index.faiss_index import Candidates, faiss_reason
from index.gpu import placement
from index.store import Selection

Found = tuple[Int64Array, Float32Array]  # entity rows and their cosines, falling

_NOTHING: Found = (np.empty(0, np.int64), np.empty(0, np.float32))
DEFAULT_K_FACTOR = 6.4  # an approximate index orders by estimates: look at more than asked for, then order exactly
_FEWEST = 10  # `k_factor` is tuned for ten results; one alone would get too few candidates
_SCANNED_AT_MOST = 10_000  # so few selected embeddings are all looked at: exact, and quicker than an index that skips


class _Allowed(NamedTuple):
    """`mask_N` bool [N] by position, None for all; how many embeddings and entities that leaves."""

    mask_N: BoolArray | None
    embeddings: int
    entities: int


class EntityIndex:
    """An index over the embeddings of a bundle.

    faiss makes no promise for searches from several threads: let one thread own this object.
    """

    def __init__(
        self,
        candidates: Candidates,
        embeddings: Embeddings,
        parameters: Mapping[str, Any],
        *,
        device: str = "cpu",
        why: str = "as asked for",
    ) -> None:
        """`device` says where `candidates` come from, and `why` from there."""
        self.candidates = candidates
        self.device, self.device_why = device, why
        self._embeddings = embeddings
        self._parameters = dict(parameters)
        self._rows_N = embeddings.rows_N
        self.entity_count = _entities(self._rows_N)
        self._everything = _Allowed(None, len(self._rows_N), self.entity_count)
        self._images_each = math.ceil(len(self._rows_N) / max(self.entity_count, 1))
        self._rescorer = faiss.IndexScalarQuantizer(
            embeddings.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        self._allowed: WeakKeyDictionary[Selection, _Allowed] = WeakKeyDictionary()

    @classmethod
    def read(cls, path: Path, embeddings: EmbeddingShards, parameters: Mapping[str, Any], device: str = "cpu") -> Self:
        """Map an index file, or put it on GPUs where `device` (`auto`, `cpu`, `cuda`) says so.

        Raises `BundleAltered` if it is none, or not one over these embeddings, `UserError` where cuda is asked for and
        the GPUs cannot have it.
        """
        try:
            # Mapped where faiss can, so that several processes share one copy.
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise BundleAltered(
                f"{path} is no index ({faiss_reason(error)}); build it again with `wikiclip index`"
            ) from error
        if index.d != embeddings.dim or index.ntotal != len(embeddings):
            raise BundleAltered(
                f"the index holds {index.ntotal} embeddings of width {index.d}, the bundle {len(embeddings)} "
                f"of width {embeddings.dim}; build it again with `wikiclip index`"
            )
        placed = placement(index, embeddings, device)
        return cls(placed.candidates, embeddings, parameters, device=placed.device, why=placed.why)

    def __len__(self) -> int:
        return len(self._rows_N)

    def search(
        self,
        query_embeddings_BD: Float32Array,
        top_k: int,
        parameters: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> tuple[Int64Array, Float32Array]:
        """The `top_k` best entities of each query: rows int64 [B, K] and cosines float32 [B, K], falling.

        Queries need not be normalised. Row -1 with score 0 pads where there are fewer entities than asked for.
        `parameters` (`nprobe`, `efSearch`, `k_factor`) hold for this call, over those in the bundle's index
        manifest. Only entities that `selection` allows are found, and always as many as asked for if it allows so
        many. Equal scores stand in row order.
        """
        queries_BD = np.ascontiguousarray(query_embeddings_BD, np.float32)
        queries_BD = queries_BD / np.maximum(np.linalg.norm(queries_BD, axis=1, keepdims=True), np.float32(1e-12))
        allowed = self._everything if selection is None else self._allowed_by(selection)
        wanted = min(top_k, allowed.entities)
        if wanted == 0:
            found = [_NOTHING] * len(queries_BD)
        elif allowed.mask_N is not None and allowed.embeddings <= _SCANNED_AT_MOST:
            found = self._scan(queries_BD, allowed)
        else:
            found = self._approach(queries_BD, wanted, allowed, {**self._parameters, **(parameters or {})})
        rows_BK = np.full((len(queries_BD), top_k), -1, np.int64)
        scores_BK = np.zeros((len(queries_BD), top_k), np.float32)
        for place, (rows, scores) in enumerate(found):
            count = min(len(rows), top_k)
            rows_BK[place, :count], scores_BK[place, :count] = rows[:count], scores[:count]
        return rows_BK, scores_BK

    def images_of(self, row: int) -> Float32Array:
        """The embeddings [I, D] of an entity's images. Any thread may ask, also while another searches."""
        start, end = np.searchsorted(self._rows_N, (row, row + 1))
        return self._embeddings.at(np.arange(start, end, dtype=np.int64))

    def _approach(
        self, queries_BD: Float32Array, wanted: int, allowed: _Allowed, settings: Mapping[str, Any]
    ) -> list[Found]:
        """Candidates of the index, twice as many again for as long as they hold too few entities."""
        candidates, mask_N = self.candidates, allowed.mask_N
        k_factor = float(settings.get("k_factor", DEFAULT_K_FACTOR))
        fetch = wanted if candidates.exact else math.ceil(k_factor * max(wanted, _FEWEST))
        # Another look costs as much as the first. Rounding may change places with what is just out of sight.
        fetch = max(fetch, wanted * self._images_each + (_FEWEST if candidates.close else 0))
        scarcity = len(self) / allowed.embeddings
        if candidates.filters:
            effort = math.sqrt(scarcity)  # what is allowed is further off
        else:
            fetch, effort = math.ceil(scarcity * fetch), 1.0
        found: dict[int, Found] = {}
        while len(found) < len(queries_BD):
            pending = [place for place in range(len(queries_BD)) if place not in found]
            last = fetch >= candidates.limit
            fetch = min(fetch, candidates.limit)
            scores_QF, positions_QF = candidates.search(
                queries_BD[pending], fetch, settings, mask_N, math.inf if fetch == len(self) else effort
            )
            for place, scores_F, positions_F in zip(pending, scores_QF, positions_QF, strict=True):
                found_F = positions_F >= 0
                if mask_N is not None and not candidates.filters:
                    found_F &= mask_N[positions_F]
                best = self._best(queries_BD[place], positions_F[found_F], scores_F[found_F], wanted)
                # Several images of one entity can fill all that was fetched, and a filter leave little of it.
                if len(best[0]) >= wanted:
                    found[place] = best
                elif last:
                    (found[place],) = self._scan(queries_BD[place : place + 1], allowed)
            fetch, effort = 2 * fetch, 2 * effort
        return [found[place] for place in range(len(queries_BD))]

    def _scan(self, queries_BD: Float32Array, allowed: _Allowed) -> list[Found]:
        """All entities that are allowed, exactly."""
        positions_A = np.arange(len(self)) if allowed.mask_N is None else np.flatnonzero(allowed.mask_N)
        scores_BA = np.empty((len(queries_BD), len(positions_A)), np.float32)
        for start in range(0, len(positions_A), _SCANNED_AT_MOST):
            part = slice(start, start + _SCANNED_AT_MOST)
            scores_BA[:, part] = queries_BD @ self._embeddings.at(positions_A[part]).T
        return [self._fold(positions_A, scores_A) for scores_A in scores_BA]

    def _best(self, query_D: Float32Array, positions_F: Int64Array, scores_F: Float32Array, wanted: int) -> Found:
        """Candidates to entities: true cosines, each entity at its best image, best first."""
        if self.candidates.exact:
            return self._fold(positions_F, scores_F)
        if self.candidates.close:
            return self._fold(positions_F, self._embeddings.at(positions_F) @ query_D)
        stored_FD = self._embeddings.stored(positions_F)
        self._rescorer.reset()
        self._rescorer.add_sa_codes(stored_FD.view(np.uint8))
        scores_1F, places_1F = self._rescorer.search(query_D[None], len(positions_F))
        places_F = places_1F[0]
        # These are cosines but for the rounding of what is stored: a few more entities, and then exactly.
        enough = 2 * wanted + _FEWEST
        if len(self) == self.entity_count:
            places_F = places_F[:enough]
            return self._fold(positions_F[places_F], normalised(stored_FD[places_F]) @ query_D)
        # An entity's best image need not be among the candidates.
        rows, _ = self._fold(positions_F[places_F], scores_1F[0])
        positions_F = self._all_images(np.sort(rows[:enough]))
        return self._fold(positions_F, self._embeddings.at(positions_F) @ query_D)

    def _fold(self, positions_F: Int64Array, scores_F: Float32Array) -> Found:
        """Each entity at its best image, best first."""
        rows_F = self._rows_N[positions_F]
        order_F = np.lexsort((rows_F, -scores_F))
        rows_F, scores_F = rows_F[order_F], scores_F[order_F]
        first_F = np.sort(np.unique(rows_F, return_index=True)[1])
        return rows_F[first_F], np.minimum(scores_F[first_F], np.float32(1.0))  # rounding must not give 1.0000001

    def _all_images(self, rows_E: Int64Array) -> Int64Array:
        """The positions of all embeddings of some entities, in order: shards are written in row order."""
        starts_E, ends_E = np.searchsorted(self._rows_N, rows_E, "left"), np.searchsorted(self._rows_N, rows_E, "right")
        counts_E = ends_E - starts_E
        return np.arange(counts_E.sum()) + np.repeat(ends_E - np.cumsum(counts_E), counts_E)

    def _allowed_by(self, selection: Selection) -> _Allowed:
        if (known := self._allowed.get(selection)) is not None:
            return known
        mask_N = selection.allowed_E[self._rows_N]
        allowed = _Allowed(mask_N, int(np.count_nonzero(mask_N)), _entities(self._rows_N[mask_N]))
        self._allowed[selection] = allowed
        return allowed


def _entities(rows_N: Int64Array) -> int:
    """How many different rows there are, of rows in order."""
    return int(np.count_nonzero(np.diff(rows_N, prepend=-1)))
