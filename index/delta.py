"""Live changes in memory: the entities that were put, with their embeddings, and the rows of the base that they hide.

Shapes: M entities put (one embedding each), D embedding width, H rows of the base, B queries, K results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Self

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array
from index.store import StoredEntity
from index.top_k import nearest


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One immutable revision of the changes, so that a search and everything after it see the same state.

    `rows_M` rise and are above all rows of the base. `hidden_H` are rows of the base. `latest` maps each changed entity
    to its row, or None if it was deleted.
    """

    revision: int
    rows_M: Int64Array
    embeddings_MD: Float32Array
    hidden_H: Int64Array
    entities: Mapping[int, StoredEntity]
    latest: Mapping[str, int | None]

    @classmethod
    def empty(cls, embedding_dim: int, revision: int) -> Self:
        return cls(
            revision=revision,
            rows_M=np.empty(0, np.int64),
            embeddings_MD=np.empty((0, embedding_dim), np.float32),
            hidden_H=np.empty(0, np.int64),
            entities={},
            latest={},
        )

    def changed(
        self,
        revision: int,
        put: Sequence[tuple[StoredEntity, Float32Array]],
        deleted: Sequence[str],
        hidden: Sequence[int],
    ) -> Delta:
        """Return the state in which these entities are put, in row order, with their embeddings [D], others deleted.

        `hidden` are rows of the base to hide.
        """
        entities = {**self.entities, **{entity.row: entity for entity, _ in put}}
        latest = {**self.latest, **{entity.entity_id: entity.row for entity, _ in put}, **dict.fromkeys(deleted)}
        changed_ids = [*(entity.entity_id for entity, _ in put), *deleted]
        replaced = [row for entity_id in changed_ids if (row := self.latest.get(entity_id)) is not None]
        for row in replaced:
            del entities[row]
        kept_M = ~np.isin(self.rows_M, replaced)
        return Delta(
            revision=revision,
            rows_M=np.concatenate([self.rows_M[kept_M], np.array([entity.row for entity, _ in put], np.int64)]),
            embeddings_MD=np.concatenate([self.embeddings_MD[kept_M], *(embedding_D[None] for _, embedding_D in put)]),
            hidden_H=np.union1d(self.hidden_H, np.array(hidden, np.int64)),
            entities=entities,
            latest=latest,
        )

    def with_types(self, types: Set[str]) -> BoolArray:
        """Return bool [M]: which entities have any of `types`."""
        return np.array([not types.isdisjoint(self.entities[row].types) for row in self.rows_M.tolist()], np.bool_)

    def search(
        self, queries_BD: Float32Array, top_k: int, allowed_M: BoolArray | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """Return the best `top_k` entities of L2-normalised queries, as `nearest` does."""
        return nearest(queries_BD, self.embeddings_MD, self.rows_M, top_k, allowed_M)
