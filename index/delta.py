"""Live changes in memory: the entities that were put, with their embeddings, and the rows of the base that they hide.

A `Delta` is one immutable revision, so that a search and everything after it see the same state. `DeltaBuilder` makes
the next one. Revisions share arrays, which only grow. A delta reads no further than its own length.

Shapes: M entities put so far (one embedding each), D embedding width, H rows of the base, B queries, K results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from index.embeddings import BoolArray, Float32Array, Int64Array
from index.store import StoredEntity

_FIRST_CAPACITY = 64
_MIN_GARBAGE = 1024  # replaced or deleted entities before the arrays are compacted


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One revision of the changes. `rows_M` rise and are above all rows of the base. `hidden_H` are rows of the base.

    `latest` maps each changed entity to its row, or None if it was deleted. It is shared with later revisions and
    reflects the latest one.
    """

    revision: int
    rows_M: Int64Array
    embeddings_MD: Float32Array
    alive_M: BoolArray
    hidden_H: Int64Array
    alive_count: int
    entities: Mapping[int, StoredEntity]
    latest: Mapping[str, int | None]

    def with_types(self, types: Sequence[str]) -> BoolArray:
        """Return bool [M]: which entities exist and have any of `types`."""
        selected_M = self.alive_M.copy()
        for place in np.flatnonzero(selected_M).tolist():
            selected_M[place] = not set(types).isdisjoint(self.entities[int(self.rows_M[place])].types)
        return selected_M

    def search(self, queries_BD: Float32Array, top_k: int, allowed_M: BoolArray) -> tuple[Int64Array, Float32Array]:
        """Return the best `top_k` allowed entities of L2-normalised queries, by exact search and in no order.

        Rows int64 and cosines float32 [B, K], with fewer columns if there are fewer entities.
        """
        allowed = np.flatnonzero(allowed_M)
        scores_BM = (queries_BD @ self.embeddings_MD.T)[:, allowed]
        rows_M = self.rows_M[allowed]
        if len(allowed) <= top_k:
            return np.broadcast_to(rows_M, scores_BM.shape), scores_BM
        best_BK = np.argpartition(-scores_BM, top_k - 1, axis=1)[:, :top_k]
        # Of equal scores the lowest rows win, which partitioning does not guarantee.
        lowest_B1 = np.take_along_axis(scores_BM, best_BK, axis=1).min(axis=1, keepdims=True)
        if np.any((scores_BM >= lowest_B1).sum(axis=1) > top_k):
            best_BK = np.argsort(-scores_BM, axis=1, kind="stable")[:, :top_k]
        return rows_M[best_BK], np.take_along_axis(scores_BM, best_BK, axis=1)


class DeltaBuilder:
    """Collects changes and makes the next `Delta`. Not thread-safe."""

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
        """Add an entity at a row above all others. `base_row` is its row in the base, if it has one."""
        self._remove(entity.entity_id, base_row)
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
        """Remove an entity, whether it was put or is in the base."""
        self._remove(entity_id, base_row)
        self._latest[entity_id] = None

    def delta(self, revision: int) -> Delta:
        """Return the state after all changes so far."""
        if len(self._dead) > max(_MIN_GARBAGE, self._count // 2):
            self._compact()
        alive_M = np.ones(self._count, np.bool_)
        alive_M[list(self._dead)] = False
        return Delta(
            revision=revision,
            rows_M=self._rows[: self._count],
            embeddings_MD=self._embeddings[: self._count],
            alive_M=alive_M,
            hidden_H=np.array(sorted(self._hidden), np.int64),
            alive_count=self._count - len(self._dead),
            entities=self._entities,
            latest=self._latest,
        )

    def _remove(self, entity_id: str, base_row: int | None) -> None:
        if (place := self._place_of.pop(entity_id, None)) is not None:
            self._dead.add(place)
        if base_row is not None:
            self._hidden.add(base_row)

    def _compact(self) -> None:
        """Copy what is alive to new arrays and tables. Earlier deltas keep the old ones."""
        alive = np.array(sorted(self._place_of.values()), np.int64)
        dim = self._embeddings.shape[1]
        free = max(_FIRST_CAPACITY - len(alive), 0)  # doubling needs a length above 0
        self._embeddings = np.concatenate([self._embeddings[alive], np.empty((free, dim), np.float32)])
        self._rows = np.concatenate([self._rows[alive], np.empty(free, np.int64)])
        self._count = len(alive)
        self._dead = set()
        rows = self._rows[: self._count].tolist()
        self._place_of = {self._entities[row].entity_id: place for place, row in enumerate(rows)}
        self._entities = {row: self._entities[row] for row in rows}
        self._latest = dict(self._latest)
