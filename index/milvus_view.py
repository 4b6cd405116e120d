"""Searching and changing the entities of a bundle whose embeddings are in Milvus.

Records and titles of the bundle's entities come from its own store; those that were put while serving lie in Milvus
whole. Nothing is kept here but the records that a search has just brought: every host sees the same.

Shapes: B queries, K entities asked for, F hits fetched, I images of one entity, D the embedding width.
"""

from __future__ import annotations

import base64
import json
import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import BadParameter, UnknownEntity, UserError
from index import milvus
from index.bundle import Bundle
from index.embeddings import Float32Array, Int64Array, normalised
from index.milvus import MOST, PUT_FROM
from index.store import EntityStore, Selection, StoredEntity, distinct

_ANSWER_S = 10.0
_STRONG_FOR_S = 10.0  # after a change was seen; later, what may be 5 s old (`Bounded`) has it, and is sooner there
_RECORDS_KEPT = 10_000
_FEWEST = 20


@dataclass(frozen=True, kw_only=True)
class MilvusState:
    """How many changes all processes made, and how many more entities there are by them."""

    revision: int
    added: int


class MilvusEntities:
    """A loaded collection: `LiveChanges` to it, and views of it. Safe for several threads.

    Raises `BundleError` where the bundle is not loaded, `UserError` where Milvus cannot be reached.
    """

    poll_interval_s = 0.5

    def __init__(self, uri: str, bundle: Bundle, store: EntityStore) -> None:
        self._client = milvus.connect(uri)
        if not milvus.is_loaded(self._client, bundle):
            self._client.close()
            raise milvus.not_loaded(bundle)
        self._name, self._counters = milvus.collection_name(bundle), milvus.counters_name(bundle)
        self.store = store
        counts = bundle.manifest.counts
        self.base_count = counts.entities
        self.images_each = max(1.0, counts.embeddings / max(1, counts.entities))
        self._records: OrderedDict[int, StoredEntity] = OrderedDict()
        self._keeping = threading.Lock()
        self._writer, self._made, self._added = uuid.uuid4().hex, 0, 0
        self._changed_at = time.monotonic()
        with milvus.answered():
            for each in (self._name, self._counters):
                self._client.load_collection(each, timeout=60)
            self._search_parameters = self._tuned()
        self._state = self._read_state()

    def close(self) -> None:
        self._client.close()

    @property
    def delta(self) -> MilvusState:
        return self._state

    def refresh(self) -> MilvusState:
        """Look whether any process has changed something. Raises `Unavailable`."""
        state = self._read_state()
        if state != self._state:
            self._changed_at = time.monotonic()
            self._state = state
        return self._state

    def put(self, entity: StoredEntity, embedding_D: Float32Array, thumbnail: bytes | None) -> bool:
        """Add an entity or replace it, for all hosts. Raises `Unavailable`, `BadParameter` for too large a record."""
        picture = "" if thumbnail is None else base64.b64encode(thumbnail).decode()
        try:
            row = milvus.put_row(entity, normalised(embedding_D[None])[0], picture)
        except UserError as error:
            raise BadParameter(str(error)) from error
        with milvus.answered():
            created = not self._rows_of(entity.entity_id)
            self._client.upsert(self._name, [row], timeout=_ANSWER_S)
            self._client.delete(self._name, filter=f"key == {row['key']} and pk < {PUT_FROM}", timeout=_ANSWER_S)
        self._count(added=int(created))
        return created

    def delete(self, entity_id: str) -> None:
        """Take an entity out, for all hosts. Raises `UnknownEntity`, `Unavailable`."""
        with milvus.answered():
            if not self._rows_of(entity_id):
                raise UnknownEntity(f"no entity {entity_id!r} here; look for it by title")
            self._client.delete(self._name, filter=f"key == {milvus.hashed(entity_id)}", timeout=_ANSWER_S)
        self._count(added=-1)

    def search(self, queries_BD: Float32Array, count: int, condition: str) -> list[list[dict[str, Any]]]:
        """Up to `count` hits [B, F] of each query, nearest first. Raises `Unavailable`."""
        parameters = {**self._search_parameters, "ef": max(count, self._search_parameters.get("ef", 0))}
        with milvus.answered():
            found = self._client.search(
                self._name,
                data=list(queries_BD),
                filter=condition,
                limit=count,
                output_fields=["row", "record"],
                search_params={"metric_type": "COSINE", "params": parameters},
                consistency_level=self._consistency(),
                timeout=_ANSWER_S,
            )
        return [[dict(hit["entity"], score=hit["distance"]) for hit in hits] for hits in found]

    def query(self, condition: str, fields: Sequence[str], *, strong: bool = True) -> list[dict[str, Any]]:
        """Up to `MOST` rows for which a condition holds. Raises `Unavailable`."""
        with milvus.answered():
            found = self._client.query(
                self._name,
                filter=condition,
                output_fields=list(fields),
                limit=MOST,
                consistency_level="Strong" if strong else self._consistency(),
                timeout=_ANSWER_S,
            )
        return [dict(row) for row in found]

    def keep(self, row: int, record: str) -> StoredEntity:
        """The entity of a record that was found, kept for `by_row`."""
        entity = milvus.read_record(record)
        with self._keeping:
            self._records[row] = entity
            self._records.move_to_end(row)
            while len(self._records) > _RECORDS_KEPT:
                self._records.popitem(last=False)
        return entity

    def by_row(self, row: int) -> StoredEntity:
        """An entity that was put while serving, as it was when it was found. Raises `UnknownEntity`."""
        kept = self._records.get(row)
        if kept is not None:
            return kept
        found = self.query(f"pk == {row}", ["record"])
        if not found:
            raise UnknownEntity("the entity was deleted meanwhile; ask again")
        return self.keep(row, found[0]["record"])

    def get(self, entity_id: str) -> StoredEntity:
        """The entity of that id as it is now. Raises `UnknownEntity`, `Unavailable`."""
        found = self._rows_of(entity_id)
        if not found:
            raise UnknownEntity(f"no entity {entity_id!r} here; look for it by title")
        newest = max(found, key=lambda each: each["row"])
        return self.store.get(entity_id) if newest["row"] < PUT_FROM else milvus.read_record(newest["record"])

    def _rows_of(self, entity_id: str) -> list[dict[str, Any]]:
        return self.query(f"key == {milvus.hashed(entity_id)}", ["row", "record"])

    def _count(self, added: int) -> None:
        self._made, self._added = self._made + 1, self._added + added
        with milvus.answered():
            milvus.count_change(self._client, self._counters, self._writer, changes=self._made, added=self._added)
        self.refresh()

    def _read_state(self) -> MilvusState:
        with milvus.answered():
            rows = self._client.query(
                self._counters,
                filter="changes >= 0",
                output_fields=["changes", "added"],
                limit=MOST,
                consistency_level="Strong",
                timeout=_ANSWER_S,
            )
        changes, added = (sum(int(row[each]) for row in rows) for each in ("changes", "added"))
        return MilvusState(revision=changes, added=added)

    def _consistency(self) -> str:
        return "Strong" if time.monotonic() - self._changed_at < _STRONG_FOR_S else "Bounded"

    def _tuned(self) -> dict[str, int]:
        """How far to look, on the side of finding more."""
        described = self._client.describe_index(self._name, "embedding")
        if described["index_type"] == "IVF_FLAT":
            return {"nprobe": max(1, round(2 * math.sqrt(int(described.get("nlist", 1024)))))}
        return {"ef": 256} if described["index_type"] == "HNSW" else {}


class MilvusView:
    """`EntityView` of a collection, as its entities are when they are asked for; `delta` says up to which change."""

    def __init__(self, entities: MilvusEntities) -> None:
        self._entities = entities
        self._store = entities.store
        self.delta = entities.delta
        self.entity_count = entities.base_count + self.delta.added
        self.version = f"+{self.delta.revision}" if self.delta.revision else ""

    def select(self, types: tuple[str, ...]) -> Selection:
        """Milvus filters by itself: nothing is looked up."""
        return Selection(types, np.empty(0, np.bool_))

    def search(
        self, query_embeddings_BD: Float32Array, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """The `top_k` best entities of each query, as `EntityIndex.search` gives them."""
        queries_BD = normalised(np.atleast_2d(query_embeddings_BD))
        condition = "" if selection is None else milvus.types_filter(selection.types)
        rows_BK = np.full((len(queries_BD), top_k), -1, np.int64)
        scores_BK = np.zeros((len(queries_BD), top_k), np.float32)
        pending = list(range(len(queries_BD)))
        fetch = min(MOST, math.ceil(self._entities.images_each * top_k) + _FEWEST)
        while pending:
            hits = self._entities.search(queries_BD[pending], fetch, condition)
            short = []
            for place, found in zip(pending, hits, strict=True):
                best = self._folded(found)
                if len(best) < top_k and len(found) == fetch < MOST:
                    short.append(place)  # several images of one entity filled all that was fetched
                    continue
                if len(best) < top_k:  # the graph may have reached no more: all that is left is looked at
                    best = self._scanned(queries_BD[place], condition, best)
                best = best[:top_k]
                rows_BK[place, : len(best)] = [row for row, _ in best]
                scores_BK[place, : len(best)] = [score for _, score in best]
            pending, fetch = short, min(MOST, 2 * fetch)
        return rows_BK, scores_BK

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """The entities at rows that `search` gave, in the order asked for."""
        base = {entity.row: entity for entity in self._store.by_rows([row for row in rows if row < PUT_FROM])}
        return [base[row] if row < PUT_FROM else self._entities.by_row(int(row)) for row in rows]

    def cached(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        """What `by_rows` gives where that asks no file and no server: never."""
        return None

    def images_of(self, row: int) -> Float32Array:
        """The embeddings [I, D] of an entity's images, by a row that `search` gave."""
        found = self._entities.query(f"row == {int(row)}", ["embedding"])
        return normalised(np.array([each["embedding"] for each in found], np.float32))

    def attended_words(self, row: int) -> tuple[tuple[int, int, float], ...]:
        """As `EntityStore.heard`; nothing is kept of what was put while serving."""
        return self._store.attended_words(row) if row < PUT_FROM else ()

    def get(self, entity_id: str) -> StoredEntity:
        """The entity of that id. Raises `UnknownEntity`."""
        return self._entities.get(entity_id)

    def thumbnail(self, entity_id: str) -> bytes | None:
        """The WebP thumbnail of an entity, None where there is none. Raises `UnknownEntity`."""
        row = self._entities.get(entity_id).row
        if row < PUT_FROM:
            return self._store.thumbnail(entity_id)
        found = self._entities.query(f"pk == {row}", ["thumbnail"])
        return base64.b64decode(found[0]["thumbnail"]) if found and found[0]["thumbnail"] else None

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Entities of the bundle as `EntityStore.search_titles` finds them, then those put while serving in whose
        titles each word of the query begins a word."""
        wanted = milvus.words(query)
        base = self._store.search_titles(query, 2 * limit) if query.strip() else []
        keys = {milvus.hashed(entity.entity_id): entity for entity in base}
        found = []
        if keys:
            condition = f"key in {json.dumps(sorted(keys))} and pk < {PUT_FROM}"
            there = {int(each["key"]) for each in self._entities.query(condition, ["key"])}
            found = [entity for key, entity in keys.items() if key in there]
        put: list[StoredEntity] = []
        if wanted:
            rows = self._entities.query(milvus.beginnings_filter(wanted), ["record"])
            put = sorted((milvus.read_record(each["record"]) for each in rows), key=lambda each: len(each.title))
        return distinct([*found, *put], limit)

    def _folded(self, hits: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
        """Rows with their best scores, best first; equal scores in row order."""
        best: dict[int, float] = {}
        for hit in hits:
            row = int(hit["row"])
            if row >= PUT_FROM:
                self._entities.keep(row, hit["record"])
            best[row] = max(best.get(row, -2.0), min(1.0, float(hit["score"])))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))

    def _scanned(
        self, query_D: Float32Array, condition: str, found: list[tuple[int, float]]
    ) -> list[tuple[int, float]]:
        """All rows for which the condition holds, exactly; `found` where they are more than Milvus gives at once."""
        rows = self._entities.query(condition or "pk >= 0", ["row", "record", "embedding"], strong=False)
        if not rows or len(rows) == MOST:
            return found
        scores = normalised(np.array([each["embedding"] for each in rows], np.float32)) @ query_D
        return self._folded([dict(each, score=score) for each, score in zip(rows, scores.tolist(), strict=True)])
