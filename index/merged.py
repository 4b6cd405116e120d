"""Base and delta as one: the bundle's index and store, with the live changes over them.

Shapes: B queries, K entities asked for, F candidates fetched from the base, M entities put, H hidden rows of the base,
D the embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import numpy.typing as npt

from core.errors import UnknownEntity
from index.delta import Delta, Float32Array, Int64Array
from index.embeddings import normalised
from index.live import LiveSegment
from index.search import EntityIndex
from index.selection import Selection
from index.store import EntityStore, StoredEntity, distinct

_SPARE = 32  # how many hidden entities a first look at the base makes up for


@dataclass(frozen=True, eq=False)
class _MergedSelection(Selection):
    """`base` is the base's own, one object for all states; `allowed_M` bool [M] is for the entities of the delta."""

    base: Selection
    allowed_M: npt.NDArray[np.bool_]


class MergedView:
    """One state of what is served: searching it and naming what was found belong together.

    Without `live` it is the bundle alone. What asks by id or by title (`get`, `thumbnail`, `search_titles`) sees the
    latest state. `search` belongs to the thread that owns the index, the rest to any.
    """

    def __init__(
        self,
        index: EntityIndex,
        store: EntityStore,
        live: LiveSegment | None = None,
        *,
        select: Callable[[tuple[str, ...]], Selection] | None = None,
    ) -> None:
        """`select` is `store.select`, or one that keeps what it gave for other states of the same bundle."""
        self._index = index
        self._store = store
        self._live = live
        self._select = select or store.select
        self._base_count = len(store)
        self.delta: Delta | None = None if live is None else live.delta
        self.entity_count = index.entity_count
        self.version = ""
        if live is not None and self.delta is not None:
            self.entity_count += self.delta.alive_count - len(self.delta.hidden_H)
            if self.delta.generation > live.from_generation:
                self.version = f"+{self.delta.generation}"

    def select(self, types: tuple[str, ...]) -> Selection:
        """The entities that have one of `types` or more, for searches of this view."""
        base = self._select(types)
        if self.delta is None:
            return base
        return _MergedSelection(types, base.allowed_E, base, self.delta.with_types(types))

    def search(
        self, query_embeddings_BD: Float32Array, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """As `EntityIndex.search`, over base and delta: the best `top_k` of what is there, hidden entities left out.

        A selection comes from this view's `select`.
        """
        base = selection.base if isinstance(selection, _MergedSelection) else selection
        if self.delta is None or not (len(self.delta.rows_M) or len(self.delta.hidden_H)):
            return self._index.search(query_embeddings_BD, top_k, selection=base)
        allowed_M = selection.allowed_M if isinstance(selection, _MergedSelection) else self.delta.alive_M
        base_rows_BF, base_scores_BF = self._search_base(query_embeddings_BD, top_k, self.delta.hidden_H, base)
        rows_BM, scores_BM = self.delta.search(normalised(query_embeddings_BD), top_k, allowed_M)
        rows_BF = np.concatenate([base_rows_BF, rows_BM], axis=1)
        scores_BF = np.concatenate([base_scores_BF, np.minimum(scores_BM, np.float32(1.0))], axis=1)
        order_BK = np.lexsort((rows_BF, np.where(rows_BF < 0, np.inf, -scores_BF)))[:, :top_k]
        rows_BK = np.take_along_axis(rows_BF, order_BK, axis=1)
        scores_BK = np.take_along_axis(scores_BF, order_BK, axis=1)
        short = top_k - rows_BK.shape[1]
        if short > 0:
            rows_BK = np.pad(rows_BK, ((0, 0), (0, short)), constant_values=-1)
            scores_BK = np.pad(scores_BK, ((0, 0), (0, short)))
        return rows_BK, scores_BK

    def _search_base(
        self, queries_BD: Float32Array, top_k: int, hidden_H: Int64Array, selection: Selection | None
    ) -> tuple[Int64Array, Float32Array]:
        """At least the best `top_k` of the base that are not hidden; row -1 with score 0 stands for the others."""
        fetch = top_k + min(len(hidden_H), _SPARE)
        while True:
            rows_BF, scores_BF = self._index.search(queries_BD, fetch, selection=selection)
            seen_BF = (rows_BF >= 0) & ~np.isin(rows_BF, hidden_H)
            exhausted_B = (rows_BF[:, -1] < 0) | (fetch >= top_k + len(hidden_H))
            if np.all(exhausted_B | (seen_BF.sum(axis=1) >= top_k)):
                return np.where(seen_BF, rows_BF, -1), np.where(seen_BF, scores_BF, np.float32(0))
            fetch = min(2 * fetch, top_k + len(hidden_H))

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """The entities at rows that `search` of this view gave, in the order asked for."""
        if self.delta is None:
            return self._store.by_rows(rows)
        base = {entity.row: entity for entity in self._store.by_rows([row for row in rows if row < self._base_count])}
        put = self.delta.entities
        return [base[row] if row < self._base_count else put[row] for row in rows]

    def kept(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        """What `by_rows` gives where that asks no file, else None."""
        return self._store.kept(rows) if self.delta is None else None

    def images_of(self, row: int) -> Float32Array:
        """The embeddings [I, D] of an entity's images, by a row that `search` of this view gave."""
        if row < self._base_count or self.delta is None:
            return self._index.images_of(row)
        put_ID: Float32Array = self.delta.embeddings_MD[self.delta.rows_M == row]
        return put_ID

    def heard(self, row: int) -> tuple[tuple[int, int, float], ...]:
        """As `EntityStore.heard`; nothing is kept of what was put while serving."""
        return self._store.heard(row) if row < self._base_count else ()

    def get(self, entity_id: str) -> StoredEntity:
        """The entity of that id. Raises `UnknownEntity`."""
        delta = self.delta
        if delta is None or entity_id not in delta.latest:
            return self._store.get(entity_id)
        row = delta.latest[entity_id]
        if row is None:
            raise UnknownEntity(f"entity {entity_id!r} was deleted; look for another by title")
        return delta.entities[row]

    def thumbnail(self, entity_id: str) -> bytes | None:
        """The WebP thumbnail of an entity, None where there is none. Raises `UnknownEntity`."""
        row = self.get(entity_id).row
        if row < self._base_count or self._live is None:
            return self._store.thumbnail(entity_id)
        return self._live.thumbnail(row)

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """As `EntityStore.search_titles`; of equally good matches those of the base and of the delta alternate."""
        delta, live = self.delta, self._live
        if delta is None or live is None:
            return self._store.search_titles(query, limit)
        hidden = set(delta.hidden_H.tolist())
        base = _matches(self._store, query, limit, len(hidden), lambda entity: None if entity.row in hidden else entity)
        put = _matches(
            live.store,
            query,
            limit,
            live.folded_count,
            lambda entity: delta.entities.get(self._base_count + entity.row),
        )
        kinds = (_alternating(*kind) for kind in zip_longest(base, put, fillvalue=()))
        return distinct(chain.from_iterable(kinds), limit)


def _matches(
    store: EntityStore, query: str, limit: int, hidden: int, visible: Callable[[StoredEntity], StoredEntity | None]
) -> Iterator[list[StoredEntity]]:
    """The kinds of match of a store without what is hidden, up to `limit` each where there are as many."""
    for matches in store.title_matches(query, limit + hidden):
        yield [entity for found in matches if (entity := visible(found)) is not None][:limit]


def _alternating(base: Sequence[StoredEntity], put: Sequence[StoredEntity]) -> Iterator[StoredEntity]:
    for pair in zip_longest(base, put):
        yield from (entity for entity in pair if entity is not None)
