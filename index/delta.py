"""The changes to a bundle that is being served, in memory: what was put, what it hides, and what was deleted.

A `Delta` never changes, so that a search and all that follows from it see one state; `DeltaBuilder` makes the next one
from the changes since. Both share the arrays: they only grow, and a delta looks no further than its own end.

Shapes: M entities put so far (each has one embedding), D embedding width, H rows of the base, B queries, K results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from index.store import StoredEntity

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_FIRST_CAPACITY = 64
_FORGET_FROM = 1024  # entities that were replaced or deleted and still take room


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One state of the changes. `rows_M` rise and lie above all rows of the base; `hidden_H` are rows of the base.

    `latest` says of each changed entity its row, None where it is deleted; it is the one part that moves on.
    """

    generation: int
    rows_M: Int64Array
    embeddings_MD: Float32Array
    alive_M: npt.NDArray[np.bool_]
    hidden_H: Int64Array
    alive_count: int
    entities: Mapping[int, StoredEntity]
    latest: Mapping[str, int | None]

    def with_types(self, types: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which of the entities put are there and have one of `types` or more: bool [M]."""
        wanted, fits_M = set(types), self.alive_M.copy()
        for place in np.flatnonzero(fits_M).tolist():
            fits_M[place] = not wanted.isdisjoint(self.entities[int(self.rows_M[place])].types)
        return fits_M

    def search(
        self, queries_BD: Float32Array, top_k: int, allowed_M: npt.NDArray[np.bool_]
    ) -> tuple[Int64Array, Float32Array]:
        """The best `top_k` of those entities put that are allowed, exactly: rows int64 and cosines float32 [B, K].

        They stand in no order. Queries are L2-normalised. Fewer than `top_k` columns where there are fewer entities.
        """
        allowed = np.flatnonzero(allowed_M)
        scores_BM = (queries_BD @ self.embeddings_MD.T)[:, allowed]
        rows_M = self.rows_M[allowed]
        if len(allowed) > top_k:
            best_BK = np.argpartition(-scores_BM, top_k - 1, axis=1)[:, :top_k]
            # Equal scores stand in row order, so of those at the edge the lowest rows stay.
            edge_B1 = np.take_along_axis(scores_BM, best_BK, axis=1).min(axis=1, keepdims=True)
            if np.any((scores_BM >= edge_B1).sum(axis=1) > top_k):
                best_BK = np.argsort(-scores_BM, axis=1, kind="stable")[:, :top_k]
            return rows_M[best_BK], np.take_along_axis(scores_BM, best_BK, axis=1)
        return np.broadcast_to(rows_M, scores_BM.shape), scores_BM


class DeltaBuilder:
    """Gathers changes and makes the `Delta` after them. One thread at a time."""

    def __init__(self, embedding_dim: int) -> None:
        self._embeddings = np.empty((_FIRST_CAPACITY, embedding_dim), np.float32)
        self._rows = np.empty(_FIRST_CAPACITY, np.int64)
        self._count = 0
        self._dead: set[int] = set()  # places in the arrays
        self._place_of: dict[str, int] = {}
        self._hidden: set[int] = set()
        self._entities: dict[int, StoredEntity] = {}
        self._latest: dict[str, int | None] = {}

    def put(self, entity: StoredEntity, embedding_D: Float32Array, *, base_row: int | None) -> None:
        """Take in an entity at a row higher than any before; `base_row` is where the base has it, None if nowhere."""
        self._drop(entity.entity_id, base_row)
        if self._count == len(self._rows):
            self._embeddings = np.concatenate([self._embeddings, np.empty_like(self._embeddings)])
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._embeddings[self._count] = embedding_D
        self._rows[self._count] = entity.row
        self._entities[entity.row] = entity
        self._place_of[entity.entity_id] = self._count
        self._latest[entity.entity_id] = entity.row
        self._count += 1

    def delete(self, entity_id: str, *, base_row: int | None) -> None:
        """Take an entity out, of what was put and of the base."""
        self._drop(entity_id, base_row)
        self._latest[entity_id] = None

    def delta(self, generation: int) -> Delta:
        """The state after all changes so far."""
        if len(self._dead) > max(_FORGET_FROM, self._count // 2):
            self._forget_the_dead()
        alive_M = np.ones(self._count, np.bool_)
        alive_M[list(self._dead)] = False
        return Delta(
            generation=generation,
            rows_M=self._rows[: self._count],
            embeddings_MD=self._embeddings[: self._count],
            alive_M=alive_M,
            hidden_H=np.array(sorted(self._hidden), np.int64),
            alive_count=self._count - len(self._dead),
            entities=self._entities,
            latest=self._latest,
        )

    def _drop(self, entity_id: str, base_row: int | None) -> None:
        if (place := self._place_of.pop(entity_id, None)) is not None:
            self._dead.add(place)
        if base_row is not None:
            self._hidden.add(base_row)

    def _forget_the_dead(self) -> None:
        """Begin new arrays and tables without them: deltas that were made before keep the old ones."""
        alive = np.array(sorted(self._place_of.values()), np.int64)
        self._embeddings, self._rows = self._embeddings[alive], self._rows[alive]
        rows = self._rows.tolist()
        self._place_of = {self._entities[row].entity_id: place for place, row in enumerate(rows)}
        self._entities = {row: self._entities[row] for row in rows}
        self._latest = dict(self._latest)  # it names rows of the new table from now on
        self._count = len(rows)
        self._dead = set()
        if not rows:  # doubling needs something to double
            self._embeddings = np.empty((_FIRST_CAPACITY, self._embeddings.shape[1]), np.float32)
            self._rows = np.empty(_FIRST_CAPACITY, np.int64)
