"""Live changes in memory: the entities that were put or given images, and the rows of the base that they hide.

Shapes: M entities, N vectors that they are found by, I images of an entity, R remembered vectors of it (0 or 1), V
vectors of it that are searched, D embedding width, H rows of the base, B queries, K results.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from core.arrays import BoolArray, Float16Array, Float32Array, Int64Array, normalised
from core.errors import Conflict, NotFound
from index.embeddings import Pooling, means
from index.store import StoredEntity
from index.top_k import largest

# As a number, the id of an image that was added is in this range. Milvus uses it as the primary key.
FIRST_IMAGE_KEY, END_IMAGE_KEY = 2**61, 2**62


@dataclass(frozen=True, kw_only=True)
class References:
    """What an entity is found by: the embeddings of its images, and the remembered vector that it may have.

    `image_ids` are of the last images, those that were added while serving and can be removed.
    """

    images_ID: Float16Array
    image_ids: tuple[str, ...] = ()
    remembered_RD: Float32Array | None = None
    handicap: float = 0.0

    def searched(self, pooling: Pooling) -> tuple[Float32Array, Float32Array]:
        """Return the vectors that are searched, and what is subtracted from the cosine of each."""
        images_ID = pooled_images(normalised(self.images_ID), pooling)
        if self.remembered_RD is None:
            return images_ID, np.zeros(len(images_ID), np.float32)
        handicaps = [0.0] * len(images_ID) + [self.handicap] * len(self.remembered_RD)
        return np.concatenate([images_ID, self.remembered_RD]), np.array(handicaps, np.float32)


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One immutable revision of the changes, so that a search and everything after it see the same state.

    An entity that was put has a row above all of the base. One of the base that was given images keeps its row, and all
    its vectors are here. `rows_M` and `vector_rows_N` rise. `hidden_H` are rows of the base that are not searched
    there, `gone_H` those of them whose entity was deleted or replaced. `latest` maps each changed entity to its row, or
    None if it was deleted.
    """

    revision: int
    pooling: Pooling
    rows_M: Int64Array
    vector_rows_N: Int64Array
    vectors_ND: Float32Array
    handicaps_N: Float32Array
    hidden_H: Int64Array
    gone_H: Int64Array
    entities: Mapping[int, StoredEntity]
    references: Mapping[int, References]
    latest: Mapping[str, int | None]

    @classmethod
    def empty(cls, embedding_dim: int, revision: int, pooling: Pooling = "nearest") -> Self:
        return cls(
            revision=revision,
            pooling=pooling,
            rows_M=np.empty(0, np.int64),
            vector_rows_N=np.empty(0, np.int64),
            vectors_ND=np.empty((0, embedding_dim), np.float32),
            handicaps_N=np.empty(0, np.float32),
            hidden_H=np.empty(0, np.int64),
            gone_H=np.empty(0, np.int64),
            entities={},
            references={},
            latest={},
        )

    def changed(
        self,
        revision: int,
        put: Sequence[tuple[StoredEntity, References]],
        deleted: Sequence[str],
        hidden: Sequence[int],
        restored: Sequence[str] = (),
    ) -> Delta:
        """Return the state in which these entities are put or have these images, and others are deleted.

        `hidden` are the rows of the base that these hide. `restored` are entities of the base that lost all images they
        were given.
        """
        latest, entities, references = dict(self.latest), dict(self.entities), dict(self.references)
        replaced: list[int] = []
        for entity_id in (*(entity.entity_id for entity, _ in put), *deleted, *restored):
            if (row := latest.pop(entity_id, None)) is not None:
                replaced.append(row)
                del entities[row], references[row]
        latest |= {entity.entity_id: entity.row for entity, _ in put} | dict.fromkeys(deleted)
        entities |= {entity.row: entity for entity, _ in put}
        references |= {entity.row: each for entity, each in put}
        kept_N = ~np.isin(self.vector_rows_N, replaced)
        searched = [each.searched(self.pooling) for _, each in put]
        counts = [len(handicaps_N) for _, handicaps_N in searched]
        put_rows_N = np.repeat(np.array([entity.row for entity, _ in put], np.int64), counts)
        rows_N = np.concatenate([self.vector_rows_N[kept_N], put_rows_N])
        vectors_ND = np.concatenate([self.vectors_ND[kept_N], *(vectors_ND for vectors_ND, _ in searched)])
        handicaps_N = np.concatenate([self.handicaps_N[kept_N], *(handicaps_N for _, handicaps_N in searched)])
        if np.any(np.diff(rows_N) < 0):  # an entity keeps its row when its images change
            order_N = np.argsort(rows_N, kind="stable")
            rows_N, vectors_ND, handicaps_N = rows_N[order_N], vectors_ND[order_N], handicaps_N[order_N]
        hidden_H = np.union1d(np.setdiff1d(self.hidden_H, replaced), np.array(hidden, np.int64))
        return Delta(
            revision=revision,
            pooling=self.pooling,
            rows_M=np.unique(rows_N),
            vector_rows_N=rows_N,
            vectors_ND=vectors_ND,
            handicaps_N=handicaps_N,
            hidden_H=hidden_H,
            gone_H=np.setdiff1d(hidden_H, np.fromiter(entities, np.int64, len(entities))),
            entities=entities,
            references=references,
            latest=latest,
        )

    @cached_property
    def gone(self) -> frozenset[int]:
        """The rows of `gone_H`."""
        return frozenset(self.gone_H.tolist())

    def with_types(self, types: Set[str]) -> BoolArray:
        """Return bool [M]: which entities have any of `types`."""
        return np.array([not types.isdisjoint(self.entities[row].types) for row in self.rows_M.tolist()], np.bool_)

    def search(
        self, queries_BD: Float32Array, top_k: int, allowed_M: BoolArray | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """Return the best `top_k` entities of L2-normalised queries, as `largest` does."""
        scores_BM = np.minimum(queries_BD @ self.vectors_ND.T, np.float32(1.0)) - self.handicaps_N
        if len(self.rows_M) < len(self.vector_rows_N):
            starts_M = np.searchsorted(self.vector_rows_N, self.rows_M)
            scores_BM = np.maximum.reduceat(scores_BM, starts_M, axis=1)
        return largest(scores_BM, self.rows_M, top_k, allowed_M)


def rounded(embeddings_ID: Float32Array) -> Float16Array:
    """Return embeddings as they are stored: normalised, in float16."""
    return normalised(embeddings_ID).astype(np.float16)


def pooled_images(images_ID: Float32Array, pooling: Pooling) -> Float32Array:
    """Return the vectors [V, D] that are searched for normalised embeddings of images, as a bundle has them."""
    if pooling == "nearest" or not len(images_ID):
        return images_ID
    return normalised(means(images_ID, np.zeros(1, np.int64)))


def new_image_id() -> str:
    """Return an id that no other image has."""
    return f"{FIRST_IMAGE_KEY + secrets.randbelow(END_IMAGE_KEY - FIRST_IMAGE_KEY):x}"


def image_key(image_id: str) -> int:
    return int(image_id, 16)


def all_image_ids(image_count: int, added: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of an entity's images: first those of the bundle, which are numbered, then those `added`."""
    return (*(f"base-{number}" for number in range(image_count - len(added))), *added)


def check_removable(image_id: str, known: Collection[str | None], added: Sequence[str], *, is_only: bool) -> None:
    """Raise `NotFound` or `Conflict` unless an entity's image can be removed.

    `known` are the ids of its images, and `added` those of the ones that were added while serving. `is_only` says that
    the entity was put and would have no other vector.
    """
    if image_id not in known:
        raise NotFound(
            f"the entity has no image {image_id[:100]!r}; GET /entities/{{entity_id}} lists those that it has"
        )
    if image_id not in added:
        raise Conflict(f"{image_id} is an image of the bundle, which does not change; replace the entity instead")
    if is_only:
        raise Conflict(f"{image_id} is the entity's only image; add another one first, or delete the entity")
