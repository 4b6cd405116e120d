"""A bundle's embeddings in a Milvus collection, for catalogs larger than one machine and for changes across hosts.

A collection belongs to one bundle and is named after its content. It has a row per embedding, of the bundle and of
entities and images added while serving; the primary key says which. Entity ids, types with their ancestors, and the
words of titles are stored as 64-bit hashes, so that no filter contains user text. A second, tiny collection counts the
changes of each process. Its row `loaded` is written last and proves that the bundle is loaded completely.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from tqdm import tqdm

from core.arrays import Float32Array
from core.errors import BadParameter, Unavailable, UserError, needed_by
from index.bundle import Bundle
from index.delta import END_IMAGE_KEY
from index.embeddings import Embeddings
from index.manifest import content_fingerprint
from index.store import ENTITY_JSON, StoredEntity, words
from index.types import TypeHierarchy

with needed_by("Milvus"):
    from pymilvus import DataType, MilvusClient
    from pymilvus.exceptions import MilvusException

MAX_RESULTS = 16_384  # Milvus's limit for a search or query
# Primary keys below the first of these are positions in the bundle.
FIRST_OWN_KEY = 2**60  # the embedding of an entity that was put without images, once it has images too
# From FIRST_IMAGE_KEY on: images that were added.
FIRST_PUT_ROW = END_IMAGE_KEY  # rows below it are rows of the bundle, rows from it on were put while serving
_TIMEOUT_S = 10.0
_LOAD_TIMEOUT_S = 60.0
_LOADED = "loaded"
_WITH_ANCESTORS = "ancestors"  # a row of the second collection, as `_LOADED`: older versions stored types alone
_MAX_VARCHAR = 65_535  # bytes
_MAX_WORDS = 4096  # items of an ARRAY
_INSERT_BYTES = 8 * 1024**2  # gRPC takes 64 MiB
_EMPTY = {"words": [], "record": "", "thumbnail": ""}  # columns of entities that were put
_NEVER_MS = 2**31 - 1
_DUMMY = "nothing"  # a collection must have a vector
_DUMMY_DIM = 2


def connect(uri: str) -> MilvusClient:
    """Connect to `http://[USER:PASSWORD@]HOST:PORT`, or open an embedded Milvus in a file `PATH.db`.

    Raise `UserError` if it cannot be reached.
    """
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # callers report its errors
    address, token = _address(uri)
    options = {}
    if address.endswith(".db"):
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)  # logs missing timestamps of embedded Milvus
        options = {"grpc.keepalive_time_ms": _NEVER_MS}  # embedded Milvus refuses pymilvus's many pings
    try:
        return MilvusClient(address, token=token, timeout=_TIMEOUT_S, grpc_options=options)
    except (MilvusException, OSError, ValueError) as error:
        raise UserError(f"Milvus at {address} cannot be reached ({_reason(error)}); check the URI, start it") from error


def hash63(text: str) -> int:
    """Return 63 bits of a text's SHA-256. Among six million texts, two collide with a probability of 2e-6."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") >> 1


_type_hash = lru_cache(maxsize=65_536)(hash63)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn Milvus's errors into `Unavailable`."""
    try:
        yield
    except MilvusException as error:
        raise Unavailable(f"Milvus does not answer ({_reason(error)}); try again later") from error


class Collection:
    """The collection of a bundle, with the one that counts its changes. Thread-safe. Methods raise `Unavailable`."""

    def __init__(self, client: MilvusClient, bundle: Bundle) -> None:
        self._client = client
        self._bundle = bundle
        self.name = f"wikiclip_{content_fingerprint(bundle.manifest)}"
        self.counters = f"{self.name}_changes"

    def close(self) -> None:
        self._client.close()

    @_errors()
    def is_loaded(self) -> bool:
        """Return whether the bundle is loaded completely."""
        exists = self._client.has_collection(self.counters, timeout=_TIMEOUT_S)
        if not exists or not self._client.list_indexes(self.counters):
            return False
        self._client.load_collection(self.counters, timeout=_TIMEOUT_S)  # a restarted Milvus has nothing loaded
        return self._has_counter(_LOADED)

    @_errors()
    def has_ancestors(self) -> bool:
        """Return whether a loaded bundle was loaded with the ancestors of types."""
        return self._has_counter(_WITH_ANCESTORS)

    def _has_counter(self, writer: str) -> bool:
        found = self._client.get(self.counters, writer, ["writer"], timeout=_TIMEOUT_S, consistency_level="Strong")
        return bool(found)

    def load(self, factory: str = "auto", *, progress: bool = False) -> int:
        """Load what the bundle searches and return the number of embeddings. Replace an interrupted load.

        `factory` is `Flat`, `HNSW32`, `IVF1024,Flat`, or `auto` for HNSW32. Raise `UserError` for any other, and if the
        collection is loaded already, because it may have changes, or if an entity has no embedding.
        """
        index = _index(factory)
        if self.is_loaded():
            raise UserError(
                f"collection {self.name} holds this bundle already; serve it, or drop it in Milvus to load it again"
            )
        embeddings = self._bundle.searched()
        if without := self._bundle.manifest.counts.entities - len(np.unique(embeddings.rows_N)):
            raise UserError(
                f"{without} entities have no image and so no embedding, and Milvus holds no entity without one; leave "
                "them out of the catalog, or serve the bundle's own index"
            )
        with _errors():
            for each in (self.counters, self.name):
                if self._client.has_collection(each):
                    self._client.drop_collection(each)
            self._client.create_collection(self.name, schema=_schema(self._client, embeddings.dim))
            self._insert_all(embeddings, progress)
            self._client.flush(self.name)
            indexes = self._client.prepare_index_params("embedding", metric_type="COSINE", **index)
            for field in ("key", "row"):
                indexes.add_index(field, index_type="INVERTED")
            self._client.create_index(self.name, indexes)
            self._client.load_collection(self.name)
            indexes = self._client.prepare_index_params(_DUMMY, metric_type="COSINE", index_type="FLAT")
            self._client.create_collection(self.counters, schema=_counters_schema(self._client), index_params=indexes)
        for key in (_WITH_ANCESTORS, _LOADED):
            self.count(key, changes=0, added=0)
        return len(embeddings)

    def _insert_all(self, embeddings: Embeddings, progress: bool) -> None:
        step = max(1, _INSERT_BYTES // (4 * embeddings.dim))
        with self._bundle.store() as store:
            for start in tqdm(range(0, len(embeddings), step), desc="load", unit="batch", disable=not progress):
                positions = np.arange(start, min(start + step, len(embeddings)))
                entities = store.by_rows(embeddings.rows_N[positions].tolist())
                batch = zip(positions.tolist(), entities, embeddings.at(positions), strict=True)
                self._client.insert(self.name, [_row(*each, store.types) for each in batch])

    @_errors()
    def open(self) -> None:
        """Load a collection that Milvus has on disk into its memory, for `search` and `query`."""
        for each in (self.name, self.counters):
            self._client.load_collection(each, timeout=_LOAD_TIMEOUT_S)
        described = self._client.describe_index(self.name, "embedding")
        self._parameters: dict[str, int] = {}  # these favour recall
        if described["index_type"] == "IVF_FLAT":
            self._parameters["nprobe"] = max(1, round(2 * math.sqrt(int(described.get("nlist", 1024)))))
        elif described["index_type"] == "HNSW":
            self._parameters["ef"] = 256

    @_errors()
    def search(
        self, queries_BD: Float32Array, count: int, condition: str, consistency: str
    ) -> list[list[dict[str, Any]]]:
        """Return up to `count` hits per query, nearest first, each with `row`, `record` and `score`."""
        parameters = {**self._parameters, "ef": max(count, self._parameters.get("ef", 0))}
        found = self._client.search(
            self.name,
            data=list(queries_BD),
            filter=condition,
            limit=count,
            output_fields=["row", "record"],
            search_params={"metric_type": "COSINE", "params": parameters},
            consistency_level=consistency,
            timeout=_TIMEOUT_S,
        )
        return [[dict(hit["entity"], score=hit["distance"]) for hit in hits] for hits in found]

    @_errors()
    def query(
        self, condition: str, fields: Sequence[str], consistency: str = "Strong", *, name: str | None = None
    ) -> list[dict[str, Any]]:
        """Return up to `MAX_RESULTS` rows that meet a condition."""
        found = self._client.query(
            name or self.name,
            filter=condition,
            output_fields=list(fields),
            limit=MAX_RESULTS,
            consistency_level=consistency,
            timeout=_TIMEOUT_S,
        )
        return [dict(row) for row in found]

    def counted(self) -> tuple[int, int]:
        """Return how many changes all processes made, and how many entities they added."""
        rows = self.query("changes >= 0", ("changes", "added"), name=self.counters)
        return sum(int(row["changes"]) for row in rows), sum(int(row["added"]) for row in rows)

    @_errors()
    def upsert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, or replace those with the same keys."""
        self._client.upsert(self.name, list(rows), timeout=_TIMEOUT_S)

    @_errors()
    def delete(self, condition: str) -> None:
        """Delete the rows that meet a condition."""
        self._client.delete(self.name, filter=condition, timeout=_TIMEOUT_S)

    @_errors()
    def count(self, writer: str, *, changes: int, added: int) -> None:
        """Record how many changes `writer` made, and how many entities they added."""
        row = {"writer": writer, "changes": changes, "added": added, _DUMMY: [1.0] * _DUMMY_DIM}
        self._client.upsert(self.counters, [row], timeout=_TIMEOUT_S)


def put_row(entity: StoredEntity, embedding_D: Float32Array, thumbnail: str, types: TypeHierarchy) -> dict[str, Any]:
    """Return the row of an entity that is put. Its key depends on the entity id, so that the next put replaces it.

    Raise `BadParameter` if the record is too large.
    """
    row = FIRST_PUT_ROW + hash63(entity.entity_id) // 2
    thumbnail = thumbnail if len(thumbnail) <= _MAX_VARCHAR else ""
    stored = replace(entity, row=row, attended_words=(), has_thumbnail=bool(thumbnail))
    record = ENTITY_JSON.dump_json(stored, by_alias=True)
    if len(record) > _MAX_VARCHAR:
        raise BadParameter(f"the record has {len(record)} bytes, Milvus takes {_MAX_VARCHAR}; shorten its text")
    title_words = {word for title in (entity.title, *entity.titles.values()) for word in words(title)}
    prefixes = {word[:length] for word in title_words for length in range(1, len(word) + 1)}
    hashes = sorted(hash63(prefix) for prefix in prefixes)[:_MAX_WORDS]
    return {**_row(row, stored, embedding_D, types), "words": hashes, "record": record.decode(), "thumbnail": thumbnail}


def reference_row(
    primary_key: int, of: Mapping[str, Any], embedding_D: Float32Array, *, searched: bool
) -> dict[str, Any]:
    """Return the row of one more embedding of the entity whose row is `of`.

    If it is not searched, only the entity's mean is: then `row` is the complement, which is negative.
    """
    row, types = (of["row"], list(of["types"])) if searched else (~of["row"], [])
    return {**_EMPTY, "pk": primary_key, "row": row, "key": of["key"], "types": types, "embedding": embedding_D}


def own_key(entity_id: str) -> int:
    return FIRST_OWN_KEY + hash63(entity_id) // 8


def key_filter(entity_id: str) -> str:
    return f"key == {hash63(entity_id)}"


def prefixes_filter(query_words: Sequence[str]) -> str:
    """Return a filter for titles that have a word starting with each of these."""
    return f"array_contains_all(words, [{', '.join(str(hash63(word)) for word in query_words)}])"


def types_filter(types: Sequence[str]) -> str:
    return f"array_contains_any(types, [{', '.join(str(hash63(kind)) for kind in types)}])"


def _row(primary_key: int, entity: StoredEntity, embedding_D: Float32Array, types: TypeHierarchy) -> dict[str, Any]:
    """Return a row. Titles, records and thumbnails of the bundle's entities are in its own store."""
    key, hashes = hash63(entity.entity_id), sorted(map(_type_hash, types.names_above(entity.types)))[:_MAX_WORDS]
    return {**_EMPTY, "pk": primary_key, "row": entity.row, "key": key, "types": hashes, "embedding": embedding_D}


def _schema(client: MilvusClient, dim: int) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for name in ("pk", "row", "key"):
        schema.add_field(name, DataType.INT64, is_primary=name == "pk")
    for name in ("types", "words"):
        schema.add_field(name, DataType.ARRAY, element_type=DataType.INT64, max_capacity=_MAX_WORDS)
    for name in ("record", "thumbnail"):
        schema.add_field(name, DataType.VARCHAR, max_length=_MAX_VARCHAR)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    return schema


def _counters_schema(client: MilvusClient) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("writer", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("changes", DataType.INT64)
    schema.add_field("added", DataType.INT64)
    schema.add_field(_DUMMY, DataType.FLOAT_VECTOR, dim=_DUMMY_DIM)
    return schema


def _index(factory: str) -> dict[str, Any]:
    """Return Milvus's index type and parameters. Only indexes that keep the vectors give true cosines."""
    match = re.fullmatch(r"(auto|HNSW(\d+)?)|Flat|IVF(\d+),Flat", factory)
    if match is None:
        raise UserError(
            f"--factory {factory!r} does not keep true cosines in Milvus; use auto, Flat, HNSW32 or IVF1024,Flat"
        )
    if match[1]:
        return {"index_type": "HNSW", "params": {"M": int(match[2] or 32), "efConstruction": 200}}
    return {"index_type": "IVF_FLAT", "params": {"nlist": int(match[3])}} if match[3] else {"index_type": "FLAT"}


def _address(uri: str) -> tuple[str, str]:
    """Return the address without user and password, and Milvus's token made of those."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        token = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl(), token
    if not parts.scheme and uri.endswith(".db"):
        return uri, ""
    raise UserError("a Milvus URI is http://[USER:PASSWORD@]HOST:PORT, https://... or a file PATH.db; use one of them")


def _reason(error: Exception) -> str:
    text = getattr(error, "message", "") or str(error)
    return str(text).splitlines()[0] if text else type(error).__name__
