"""Search and change the entities of a bundle whose embeddings are in Milvus.

Records of the bundle's entities come from its own store, those of entities put while serving from Milvus. Nothing is
cached except records that a search has just returned, so every host sees the same.

Shapes: B queries, K entities asked for, I images of an entity, D embedding width.
"""

import base64
import json
import logging
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from core.arrays import Float32Array, Int64Array, Queries, normalised
from core.errors import BundleError, UnknownEntity
from index import milvus
from index.bundle import Bundle
from index.delta import FIRST_IMAGE_KEY, all_image_ids, check_removable, image_key, pooled_images
from index.milvus import FIRST_OWN_KEY, FIRST_PUT_ROW, MAX_RESULTS, Collection, connect, key_filter
from index.overlay import EntityView
from index.remembered import Remembered
from index.store import (
    ENTITY_JSON,
    EntityStore,
    Selection,
    StoredEntity,
    distinct,
    unknown_entity,
    words,
)

_STRONG_FOR_S = 10.0  # after a change. `Bounded` consistency is faster and at most 5 s behind
_CACHED_RECORDS = 10_000
_SPARE = 20  # embeddings fetched beyond the expected number
_SAME = 1e-6  # of a vector's coordinate
_FIELDS = ("pk", "row", "key", "types", "words", "record", "thumbnail", "embedding")

log = logging.getLogger("wikiclip.milvus")


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of an entity: the newest of its own, and its other `references` in the order of their keys.

    The embedding in the row of an entity that was put is pooled as soon as there are references.
    """

    entity: dict[str, Any]
    references: Sequence[dict[str, Any]]

    @property
    def is_put(self) -> bool:
        return bool(self.entity["pk"] >= FIRST_PUT_ROW)

    @property
    def image_ids(self) -> tuple[str, ...]:
        return tuple(f"{row['pk']:x}" for row in self.references if row["pk"] >= FIRST_IMAGE_KEY)


class MilvusEntities(EntityView):
    """A loaded collection, as `EntityView` and `LiveChanges`. Entities are always current. Thread-safe.

    Raise `BundleError` if the bundle is not loaded, `UserError` if Milvus cannot be reached.
    """

    first_put_row = FIRST_PUT_ROW
    poll_interval_s = 0.5
    revision: int

    def __init__(self, uri: str, bundle: Bundle, store: EntityStore) -> None:
        self._collection = Collection(connect(uri), bundle)
        if not self._collection.is_loaded():
            self.close()
            raise BundleError(
                f"bundle {bundle.name} is not loaded in Milvus; load it with `wikiclip index --backend milvus`"
            )
        self.store = store
        if store.types.rows() and not self._collection.has_ancestors():
            log.warning(
                "collection %s was loaded by an older version: `types` finds no ancestors; drop it and load it again",
                self._collection.name,
            )
        counts = bundle.manifest.counts
        self._base_count = counts.entities
        # With pooling, Milvus has one embedding per entity. Those of its images are in the bundle.
        self._images = bundle.embeddings() if bundle.manifest.pooling == "mean" else None
        self._remembered = bundle.remembered()
        self._gone: set[int] = set()  # rows of the bundle; none comes back
        self._images_each = 1.0 if self._images else max(1.0, counts.embeddings / max(1, counts.entities))
        self._records: dict[int, StoredEntity] = {}
        self._writer, self._changes, self._added = uuid.uuid4().hex, 0, 0
        self._collection.open()
        self._changed_at = time.monotonic()
        self.revision, self.entity_count, self.version = 0, self._base_count, ""
        self.refresh()

    def close(self) -> None:
        self._collection.close()

    def refresh(self) -> None:
        """Look for changes of all processes. Raise `Unavailable`."""
        revision, added = self._collection.counted()
        if revision != self.revision:
            self._changed_at = time.monotonic()
            # The revision last: a reader of the new one also reads the rest.
            self.entity_count, self.version = self._base_count + added, f"+{revision}"
            self.revision = revision

    @property
    def _consistency(self) -> str:
        """The consistency of searches, which need not see what another host did a moment ago."""
        return "Strong" if time.monotonic() - self._changed_at < _STRONG_FOR_S else "Bounded"

    def put(
        self, entity: StoredEntity, embeddings_ID: Float32Array, thumbnail: bytes | None, image_ids: Sequence[str] = ()
    ) -> bool:
        """Add or replace an entity for all hosts as `LiveSegment.put` does, and return whether it is new.

        Raise `Unavailable`, or `BadParameter` if the record is too large.
        """
        encoded = "" if thumbnail is None else base64.b64encode(thumbnail).decode()
        vectors_ID = normalised(np.atleast_2d(embeddings_ID))
        rows = [milvus.put_row(entity, self._pooled(vectors_ID), encoded, self.store.types)]
        for image_id, vector_D in zip(image_ids, vectors_ID, strict=bool(image_ids)):
            rows.append(milvus.reference_row(image_key(image_id), rows[0], vector_D, searched=self._images is None))
        created = not self._exists(entity.entity_id)
        self._collection.upsert(rows)
        self._collection.delete(f"{key_filter(entity.entity_id)} and pk not in {[row['pk'] for row in rows]}")
        self._count_change(added=int(created))
        return created

    def add_image(self, entity_id: str, image_id: str, embedding_D: Float32Array) -> None:
        """Add an image for all hosts as `LiveSegment.add_image` does. Raise `UnknownEntity`, `Unavailable`."""
        found = self._references_of(entity_id)
        vector_D = normalised(embedding_D[None])[0]
        rows = [milvus.reference_row(image_key(image_id), found.entity, vector_D, searched=self._images is None)]
        if found.is_put and not found.references:
            own_D = np.array(found.entity["embedding"], np.float32)
            rows.append(milvus.reference_row(milvus.own_key(entity_id), found.entity, own_D, searched=False))
        self._collection.upsert(rows)
        try:
            self._pool(entity_id)
        except UnknownEntity:  # another host has just deleted it
            self._collection.delete(f"pk == {image_key(image_id)}")
            raise
        self._count_change(added=0)

    def remove_image(self, entity_id: str, image_id: str) -> None:
        """Remove an image for all hosts as `LiveSegment.remove_image` does.

        Raise `UnknownEntity`, `NotFound`, `Conflict`, `Unavailable`.
        """
        found = self._references_of(entity_id)
        known = all_image_ids(self._entity(found).image_count, found.image_ids)
        is_only = found.is_put and len(found.references) == 1
        check_removable(image_id, known, found.image_ids, is_only=is_only)
        self._collection.delete(f"pk == {image_key(image_id)}")
        self._pool(entity_id)
        self._count_change(added=0)

    def delete(self, entity_id: str) -> None:
        """Delete an entity for all hosts. Raise `UnknownEntity`, `Unavailable`."""
        if not self._exists(entity_id):
            raise unknown_entity(entity_id)
        self._collection.delete(key_filter(entity_id))
        self._count_change(added=-1)

    def _find_gone(self, rows: Sequence[int]) -> set[int]:
        """Return which of the bundle's rows were deleted or replaced. Raise `Unavailable`."""
        if not self.revision:
            return set()
        unknown = [row for row in rows if row not in self._gone]
        if unknown:
            found = self._collection.query(f"row in {unknown}", ["row"], self._consistency)
            if len(found) == MAX_RESULTS and len(unknown) > 1:  # images of the first rows filled it
                half = len(rows) // 2
                return self._find_gone(rows[:half]) | self._find_gone(rows[half:])
            self._gone |= set(unknown) - {int(each["row"]) for each in found}
        return self._gone & set(rows)

    def _cache(self, row: int, record: str) -> StoredEntity:
        """Parse a record and cache it for `by_row`. Each step is atomic, so no lock is needed."""
        if len(self._records) >= _CACHED_RECORDS:
            self._records.clear()
        self._records[row] = entity = ENTITY_JSON.validate_json(record)
        return entity

    def _forget(self, row: int) -> None:
        """Drop a record from the cache."""
        self._records.pop(row, None)

    def _by_row(self, row: int) -> StoredEntity:
        """Return an entity that was put, as it was when it was found. Raise `UnknownEntity`."""
        if (cached := self._records.get(row)) is not None:
            return cached
        found = self._collection.query(f"pk == {row}", ["record"])
        if not found:
            raise UnknownEntity("the entity has been deleted; ask again")
        return self._cache(row, found[0]["record"])

    def get(self, entity_id: str) -> StoredEntity:
        """Return the entity with that id as it is now. Raise `UnknownEntity`, `Unavailable`."""
        return self._entity(self._references_of(entity_id))

    def _entity(self, found: _Rows) -> StoredEntity:
        if found.is_put:
            return ENTITY_JSON.validate_json(found.entity["record"])
        (entity,) = self.store.by_rows([int(found.entity["row"])])
        return replace(entity, image_count=entity.image_count + len(found.image_ids))

    def _references_of(self, entity_id: str) -> _Rows:
        """Return an entity's rows. Raise `UnknownEntity`, `Unavailable`."""
        rows = sorted(self._collection.query(key_filter(entity_id), _FIELDS), key=lambda row: int(row["pk"]))
        entity = [row for row in rows if row["pk"] < FIRST_OWN_KEY or row["pk"] >= FIRST_PUT_ROW]
        if not entity:
            raise unknown_entity(entity_id)
        references = [row for row in rows if FIRST_OWN_KEY <= row["pk"] < FIRST_PUT_ROW]
        return _Rows(entity=entity[-1], references=references)

    def _pooled(self, images_ID: Float32Array) -> Float32Array:
        """Return the embedding [D] that an entity's own row has: of its first image, or their mean."""
        pooled_1D = pooled_images(images_ID, "nearest" if self._images is None else "mean")[:1]
        return pooled_1D.reshape(-1)

    def _pool(self, entity_id: str) -> None:
        """Update the pooled embedding and the record in an entity's own row, if it has these. Raise `UnknownEntity`."""
        while True:  # until no other host has changed it since it was read
            found = self._references_of(entity_id)
            if not found.is_put and self._images is None:
                return
            row, record = found.entity, found.entity["record"]
            vectors = [np.array(each["embedding"], np.float32) for each in found.references]
            if found.is_put:
                entity = replace(ENTITY_JSON.validate_json(record), image_count=len(found.image_ids))
                record = ENTITY_JSON.dump_json(entity, by_alias=True).decode()
            elif self._images is not None:
                vectors = [*self._images.images_of(row["row"]), *vectors]
            embedding_D = self._pooled(np.stack(vectors))
            if record == row["record"] and np.allclose(embedding_D, row["embedding"], rtol=0, atol=_SAME):
                return
            changed = {**row, "record": record, "embedding": embedding_D}
            self._collection.upsert([changed])

    def _exists(self, entity_id: str) -> bool:
        return bool(self._collection.query(key_filter(entity_id), ["row"]))

    def _count_change(self, added: int) -> None:
        self._changes, self._added = self._changes + 1, self._added + added
        self._collection.count(self._writer, changes=self._changes, added=self._added)
        self.refresh()

    def select(self, types: tuple[str, ...]) -> Selection:
        """Return a selection. Milvus filters by types and ancestors; it has rows only for remembered vectors."""
        if self._remembered is not None:
            return self.store.select(types)
        return Selection(types, np.empty(0, np.bool_))

    def search(
        self, query_embeddings_BD: Queries, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]:
        queries_BD = normalised(np.atleast_2d(np.asarray(query_embeddings_BD)))
        condition = "" if selection is None else milvus.types_filter(selection.types)
        rows_BK = np.full((len(queries_BD), top_k), -1, np.int64)
        scores_BK = np.zeros((len(queries_BD), top_k), np.float32)
        pending = list(range(len(queries_BD)))
        fetch = min(MAX_RESULTS, math.ceil(self._images_each * top_k) + _SPARE)
        while pending:
            hits = self._collection.search(queries_BD[pending], fetch, condition, self._consistency)
            incomplete = []
            for query, found in zip(pending, hits, strict=True):
                best = self._rank(found)
                if len(best) < top_k and len(found) == fetch < MAX_RESULTS:
                    incomplete.append(query)  # images of the same entities filled the hits
                    continue
                if len(best) < top_k:  # a graph may not reach everything
                    best = self._scan(queries_BD[query], condition, best)
                best = best[:top_k]
                rows_BK[query, : len(best)] = [row for row, _ in best]
                scores_BK[query, : len(best)] = [score for _, score in best]
            pending, fetch = incomplete, min(MAX_RESULTS, 2 * fetch)
        if self._remembered is None:
            return rows_BK, scores_BK
        return self._with_remembered(self._remembered, queries_BD, rows_BK, scores_BK, selection)

    def _with_remembered(
        self,
        remembered: Remembered,
        queries_BD: Float32Array,
        rows_BK: Int64Array,
        scores_BK: Float32Array,
        selection: Selection | None,
    ) -> tuple[Int64Array, Float32Array]:
        """Merge what Milvus found with the remembered vectors of entities that were neither deleted nor replaced."""
        allowed_M = remembered.allowed_by(selection)
        while True:
            found = remembered.merge(queries_BD, rows_BK, scores_BK, allowed_M)
            gone = self._find_gone(np.setdiff1d(found[0], rows_BK).tolist())
            if not gone:
                return found
            current_M = ~np.isin(remembered.rows_M, list(gone))
            allowed_M = current_M if allowed_M is None else allowed_M & current_M

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        base = {entity.row: entity for entity in self.store.by_rows([row for row in rows if row < FIRST_PUT_ROW])}
        return [base[row] if row < FIRST_PUT_ROW else self._by_row(int(row)) for row in rows]

    def cached(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        return None  # entities must always be read

    def images_of(self, row: int) -> Float32Array:
        rows = self._collection.query(f"row in {[int(row), ~int(row)]}", ["row", "embedding"])
        base = self._images
        if base is not None:  # the mean is no image
            rows = [each for each in rows if each["row"] < 0] or ([] if row < FIRST_PUT_ROW else rows)
        images = [] if base is None or row >= FIRST_PUT_ROW else [*base.images_of(row)]
        return np.stack([*images, *(normalised(np.array([each["embedding"]], np.float32))[0] for each in rows)])

    def image_ids(self, entity_id: str) -> tuple[str, ...]:
        found = self._references_of(entity_id)
        return all_image_ids(self._entity(found).image_count, found.image_ids)

    def _put_thumbnail(self, row: int) -> bytes | None:
        found = self._collection.query(f"pk == {row}", ["thumbnail"])
        return base64.b64decode(found[0]["thumbnail"]) if found and found[0]["thumbnail"] else None

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Search the bundle as `EntityStore.search_titles` does, then entities put while serving by word prefixes."""
        visible = self._present(self.store.search_titles(query, 2 * limit))
        put: list[StoredEntity] = []
        if query_words := words(query):
            rows = self._collection.query(milvus.prefixes_filter(query_words), ["record"])
            put = sorted((ENTITY_JSON.validate_json(each["record"]) for each in rows), key=lambda each: len(each.title))
        return distinct([*visible, *put], limit)

    def _present(self, entities: Sequence[StoredEntity]) -> list[StoredEntity]:
        by_key = {milvus.hash63(each.entity_id): each for each in entities}
        if not by_key:
            return []
        condition = f"key in {json.dumps(sorted(by_key))} and pk < {FIRST_OWN_KEY}"
        present = {int(each["key"]) for each in self._collection.query(condition, ["key"])}
        return [entity for key, entity in by_key.items() if key in present]

    def _rank(self, hits: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
        """Return each row once, with its best score, best first. Equal scores are in row order."""
        best: dict[int, float] = {}
        records: dict[int, str] = {}
        for hit in hits:
            row = int(hit["row"])
            if row < 0:
                continue  # an image of which only the mean is searched
            if hit["record"]:
                records[row] = hit["record"]
            best[row] = max(best.get(row, -2.0), min(1.0, float(hit["score"])))
        for row in best:
            if row in records:
                self._cache(row, records[row])
            elif row >= FIRST_PUT_ROW:  # found by an image: its record may be another one by now
                self._forget(row)
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))

    def _scan(self, query_D: Float32Array, condition: str, found: list[tuple[int, float]]) -> list[tuple[int, float]]:
        """Rank all rows that meet the condition exactly, or return `found` if they exceed Milvus's limit."""
        rows = self._collection.query(condition or "pk >= 0", ["row", "record", "embedding"], self._consistency)
        if not rows or len(rows) == MAX_RESULTS:
            return found
        scores = normalised(np.array([each["embedding"] for each in rows], np.float32)) @ query_D
        return self._rank([dict(each, score=score) for each, score in zip(rows, scores.tolist(), strict=True)])
