"""What the service searches: a bundle's index and store with the live changes on top.

`EntityView` and `LiveChanges` are what the service needs of a backend. `OverlayView` and `index.live` are the backend
with faiss and SQLite, `index.milvus_view` is the one with Milvus.

Shapes: B queries, K entities asked for, I images of an entity, F candidates fetched from the base, M entities put,
H hidden rows of the base, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Protocol

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array, Queries, normalised
from core.errors import UnknownEntity
from index.delta import all_image_ids
from index.live import LiveSegment
from index.search import EntityIndex
from index.store import AttendedWords, EntityStore, Selection, StoredEntity, distinct
from index.top_k import best

_SPARE = 32  # hidden entities that the first search of the base allows for


class EntityView(Protocol):
    """One state of a bundle's entities and of those that were put. Their rows begin with `first_put_row`.

    Only the engine's thread calls `search`; any thread may call the rest. `revision` is that of the live changes, or
    None if nothing can change. `version` is appended to the bundle's label.
    """

    store: EntityStore
    first_put_row: int
    revision: int | None
    entity_count: int  # some may have no embedding
    version: str

    def select(self, types: tuple[str, ...]) -> Selection:
        """Select the entities with any of `types`, or a descendant of one, for searches of this view."""
        ...

    def search(
        self, query_embeddings_BD: Queries, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """Search as `EntityIndex.search` does. `selection` comes from this view's `select`."""
        ...

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """Return the entities at rows that `search` of this view returned, in the same order."""
        ...

    def cached(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        """Return what `by_rows` does if that reads nothing, otherwise None."""
        ...

    def images_of(self, row: int) -> Float32Array:
        """Return the embeddings [I, D] of an entity's images."""
        ...

    def get(self, entity_id: str) -> StoredEntity:
        """Return the entity with that id. Raise `UnknownEntity`."""
        ...

    def image_ids(self, entity_id: str) -> tuple[str, ...]:
        """Return the ids of an entity's images, those that were added while serving last. Raise `UnknownEntity`."""
        ...

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Search as `EntityStore.search_titles` does."""
        ...

    def thumbnail(self, entity_id: str) -> bytes | None:
        """Return the entity's WebP thumbnail, if it has one. Raise `UnknownEntity`."""
        row = self.get(entity_id).row
        return self.store.thumbnail(entity_id) if row < self.first_put_row else self._put_thumbnail(row)

    def attended_words(self, row: int) -> AttendedWords:
        """Return what `EntityStore.attended_words` does. Entities that were put have none."""
        return self.store.attended_words(row) if row < self.first_put_row else ()

    def sample(self, count: int) -> list[StoredEntity]:
        """Return up to `count` entities of the bundle, spread evenly over it, without those deleted or replaced."""
        return self._present(self.store.sample(count))

    def _put_thumbnail(self, row: int) -> bytes | None: ...

    def _present(self, entities: Sequence[StoredEntity]) -> list[StoredEntity]:
        """Return entities of the bundle as they are now, without those deleted or replaced."""
        ...


class LiveChanges(Protocol):
    """Puts and deletes entities, and adds and removes images of them, while serving.

    `revision` is that of the last `refresh`, which is due every `poll_interval_s` for changes of other processes. `put`
    returns whether the entity is new. A call that makes a change refreshes before it returns.
    """

    @property
    def poll_interval_s(self) -> float: ...
    @property
    def revision(self) -> int: ...

    def refresh(self) -> object: ...
    def put(
        self, entity: StoredEntity, embeddings_ID: Float32Array, thumbnail: bytes | None, image_ids: Sequence[str] = ()
    ) -> bool: ...
    def delete(self, entity_id: str) -> None: ...
    def add_image(self, entity_id: str, image_id: str, embedding_D: Float32Array) -> None: ...
    def remove_image(self, entity_id: str, image_id: str) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class _OverlaySelection(Selection):
    """`base` is shared by all states of a bundle. `allowed_M` bool [M] selects entities of the delta."""

    base: Selection
    allowed_M: BoolArray


class OverlayView(EntityView):
    """One state of a bundle and its live changes: rows that `search` returns are valid in the same view.

    Without `live` it is the bundle alone.
    """

    def __init__(self, index: EntityIndex, store: EntityStore, live: LiveSegment | None = None) -> None:
        self.store = store
        self.first_put_row = len(store)
        self._index = index
        self._live = live
        self.delta = None if live is None else live.delta
        self.revision = None if self.delta is None else self.delta.revision
        self.entity_count = len(store)
        self.version = ""
        if live is not None and self.delta is not None:
            self.entity_count += len(self.delta.entities) - len(self.delta.hidden_H)
            if self.delta.revision > live.base_revision:
                self.version = f"+{self.delta.revision}"

    def select(self, types: tuple[str, ...]) -> Selection:
        base = self.store.select(types)
        if self.delta is None:
            return base
        allowed_M = self.delta.with_types(self.store.types.names_below(types))
        return _OverlaySelection(types, base.allowed_E, base, allowed_M)

    def search(
        self, query_embeddings_BD: Queries, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]:
        base = selection.base if isinstance(selection, _OverlaySelection) else selection
        if self.delta is None or not (self.delta.entities or len(self.delta.hidden_H)):
            return self._index.search(query_embeddings_BD, top_k, selection=base)
        allowed_M = selection.allowed_M if isinstance(selection, _OverlaySelection) else None
        base_rows_BF, base_scores_BF = self._search_base(query_embeddings_BD, top_k, self.delta.hidden_H, base)
        rows_BM, scores_BM = self.delta.search(normalised(np.asarray(query_embeddings_BD)), top_k, allowed_M)
        rows_BF = np.concatenate([base_rows_BF, rows_BM], axis=1)
        scores_BF = np.concatenate([base_scores_BF, scores_BM], axis=1)
        return best(rows_BF, scores_BF, top_k)

    def _search_base(
        self, queries_BD: Queries, top_k: int, hidden_H: Int64Array, selection: Selection | None
    ) -> tuple[Int64Array, Float32Array]:
        """Return at least the best `top_k` of the base. Hidden ones are replaced by row -1 with score 0."""
        fetch = top_k + min(len(hidden_H), _SPARE)
        while True:
            rows_BF, scores_BF = self._index.search(queries_BD, fetch, selection=selection)
            visible_BF = (rows_BF >= 0) & ~np.isin(rows_BF, hidden_H)
            exhausted_B = (rows_BF[:, -1] < 0) | (fetch >= top_k + len(hidden_H))
            if np.all(exhausted_B | (visible_BF.sum(axis=1) >= top_k)):
                return np.where(visible_BF, rows_BF, -1), np.where(visible_BF, scores_BF, np.float32(0))
            fetch = min(2 * fetch, top_k + len(hidden_H))

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        if self.delta is None:
            return self.store.by_rows(rows)
        changed = self.delta.entities
        base = {each.row: each for each in self.store.by_rows([row for row in rows if row not in changed])}
        return [changed[row] if row in changed else base[row] for row in rows]

    def cached(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        return self.store.cached(rows) if self.delta is None else None

    def images_of(self, row: int) -> Float32Array:
        if self.delta is None or row not in self.delta.references:
            return self._index.images_of(row)
        return normalised(self.delta.references[row].images_ID)

    def image_ids(self, entity_id: str) -> tuple[str, ...]:
        entity = self.get(entity_id)
        references = None if self.delta is None else self.delta.references.get(entity.row)
        return all_image_ids(entity.image_count, () if references is None else references.image_ids)

    def get(self, entity_id: str) -> StoredEntity:
        delta = self.delta
        if delta is None or entity_id not in delta.latest:
            return self.store.get(entity_id)
        row = delta.latest[entity_id]
        if row is None:
            raise UnknownEntity(f"entity {entity_id!r} was deleted; search by title for another")
        return delta.entities[row]

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Search as `EntityStore.search_titles` does. Equally good matches alternate between base and delta."""
        delta, live = self.delta, self._live
        if delta is None or live is None:
            return self.store.search_titles(query, limit)
        base = self.store.title_matches(query, limit + len(delta.gone_H))
        put = live.store.title_matches(query, limit + live.compacted_count)

        def visible() -> Iterator[StoredEntity | None]:
            for base_kind, put_kind in zip_longest(base, put, fillvalue=()):
                present = self._present(base_kind)
                current = [delta.entities.get(self.first_put_row + entity.row) for entity in put_kind]
                yield from chain.from_iterable(zip_longest(present, current))

        return distinct((entity for entity in visible() if entity is not None), limit)

    def _put_thumbnail(self, row: int) -> bytes | None:
        return None if self._live is None else self._live.thumbnail(row)

    def _present(self, entities: Iterable[StoredEntity]) -> list[StoredEntity]:
        if (delta := self.delta) is None:
            return list(entities)
        return [delta.entities.get(entity.row, entity) for entity in entities if entity.row not in delta.gone]
