"""A bundle's embeddings in a Milvus collection: for more than one machine holds, and for changes across hosts.

A collection belongs to one bundle and is named by it. A row is an embedding: those of the bundle by their position,
those that were put while serving by their entity. What users can name, entity ids, types and words of titles, stands in
it as 64-bit hashes, so that no filter has a user's text in it. A second, tiny collection counts the changes of each
process that made any, and has a row that is written when all of the bundle is in: it says that the rest is whole.

Shapes: n embeddings of a batch, D the embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from core.errors import BundleError, Unavailable, UserError
from index.bundle import Bundle
from index.manifest import content_fingerprint
from index.store import StoredEntity

try:
    from pymilvus import DataType, MilvusClient
    from pymilvus.exceptions import MilvusException
except ImportError as error:
    raise UserError(f"Milvus needs the extra `milvus` ({error}); pip install 'wikiclip-serve[milvus]'") from error

Float32Array = npt.NDArray[np.float32]

MOST = 16_384  # results of one search or query: more Milvus does not give
PUT_FROM = 2**62  # rows that were put while serving; those of the bundle are its positions
LOADED = "loaded"  # the row of the second collection that says so
RECORD_BYTES = 65_535  # of a VARCHAR, at most
_ANSWER_S = 10.0
_INSERT_BYTES = 8 * 1024**2  # at once: gRPC takes 64 MiB
_DUMMY_DIM = 2  # a collection without a vector is none
_INDEXES = {
    r"auto|HNSW(?P<links>\d+)?": "HNSW",
    r"Flat": "FLAT",
    r"IVF(?P<lists>\d+),Flat": "IVF_FLAT",
}  # those that keep vectors as they are, so that scores are cosines


def connect(uri: str) -> MilvusClient:
    """A client of the Milvus at `http://[USER:PASSWORD@]HOST:PORT`, or of the embedded one in a file `PATH.db`.

    Raises `UserError` where it cannot be reached.
    """
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # what it says is told by who asked
    address, token = _address(uri)
    if address.endswith(".db"):
        logging.getLogger("grpc._server").setLevel(logging.CRITICAL)  # the embedded one lacks timestamps, and says so
    try:
        return MilvusClient(address, token=token, timeout=_ANSWER_S)
    except (MilvusException, OSError, ValueError) as error:
        raise UserError(f"Milvus at {address} cannot be reached ({_reason(error)}); check the URI, start it") from error


def collection_name(bundle: Bundle) -> str:
    """The collection of a bundle: another content is another collection."""
    return f"wikiclip_{content_fingerprint(bundle.manifest)}"


def counters_name(bundle: Bundle) -> str:
    return f"{collection_name(bundle)}_changes"


def hashed(text: str) -> int:
    """63 bits of a text's SHA-256. Two of six million are the same with a probability of 2e-6."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") >> 1


def words(text: str) -> list[str]:
    """The words of a title or a query for one: without case and accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return re.findall(r"\w+", plain)


@contextmanager
def answered() -> Iterator[None]:
    """What Milvus refuses or does not answer, as `Unavailable`: the service says so, and goes on."""
    try:
        yield
    except MilvusException as error:
        raise Unavailable(f"Milvus does not answer ({_reason(error)}); try again later") from error


def is_loaded(client: MilvusClient, bundle: Bundle) -> bool:
    """Whether all of the bundle is in its collection."""
    counters = counters_name(bundle)
    with answered():
        if not client.has_collection(counters, timeout=_ANSWER_S) or not client.list_indexes(counters):
            return False
        client.load_collection(counters, timeout=_ANSWER_S)  # a Milvus that was restarted has to be told
        found = client.query(
            counters,
            filter=f'writer == "{LOADED}"',
            output_fields=["writer"],
            consistency_level="Strong",
            timeout=_ANSWER_S,
        )
    return bool(found)


def load_bundle(client: MilvusClient, bundle: Bundle, factory: str = "auto", *, progress: bool = False) -> int:
    """Put a bundle's embeddings into its collection; returns how many. What an interrupted load left is replaced.

    `factory` is `Flat`, `HNSW32`, `IVF1024,Flat`, or `auto` for HNSW32. Raises `UserError` for any other, and where the
    collection is loaded already: it may hold changes.
    """
    index_type, parameters = _index(factory)
    name, counters = collection_name(bundle), counters_name(bundle)
    if is_loaded(client, bundle):
        raise UserError(f"collection {name} holds this bundle already; serve it, or drop it in Milvus to load it anew")
    with answered():
        for each in (counters, name):
            if client.has_collection(each):
                client.drop_collection(each)
        client.create_collection(name, schema=_schema(client, bundle.manifest.embedding_dim))
        _insert_all(client, name, bundle, progress)
        client.flush(name)
        _index_and_load(client, name, index_type, parameters)
        client.create_collection(counters, schema=_counters_schema(client))
        _index_and_load(client, counters, "FLAT", {})
        count_change(client, counters, LOADED, changes=0, added=0)
    return bundle.manifest.counts.embeddings


def count_change(client: MilvusClient, counters: str, writer: str, *, changes: int, added: int) -> None:
    """Say that `writer` made so many changes, and by how many more entities there are."""
    row = {"writer": writer, "changes": changes, "added": added, "nothing": [1.0] * _DUMMY_DIM}
    client.upsert(counters, [row], timeout=_ANSWER_S)


def put_row(entity: StoredEntity, embedding_D: Float32Array, thumbnail: str) -> dict[str, Any]:
    """The row of an entity that was put while serving; always the same for one entity, so that a later one replaces it.

    Raises `UserError` where its record is too large.
    """
    key = hashed(entity.entity_id)
    row = PUT_FROM + key // 2
    thumbnail = thumbnail if len(thumbnail) <= RECORD_BYTES else ""
    stored = replace(entity, row=row, attended_words=(), has_thumbnail=bool(thumbnail))
    record = json.dumps(stored.to_dict(), ensure_ascii=False)
    if len(record.encode()) > RECORD_BYTES:
        raise UserError(f"the record has {len(record.encode())} bytes, Milvus takes {RECORD_BYTES}; shorten its text")
    titles = {word for title in (entity.title, *entity.titles.values()) for word in words(title)}
    beginnings = {word[:length] for word in titles for length in range(1, len(word) + 1)}
    return {
        "pk": row,
        "row": row,
        "key": key,
        "types": [hashed(kind) for kind in entity.types],
        "words": sorted(hashed(each) for each in beginnings)[:4096],
        "record": record,
        "thumbnail": thumbnail,
        "embedding": embedding_D,
    }


def read_record(text: str) -> StoredEntity:
    """An entity as `put_row` wrote it."""
    return StoredEntity.from_dict(json.loads(text))


def _insert_all(client: MilvusClient, name: str, bundle: Bundle, progress: bool) -> None:
    embeddings = bundle.embeddings()
    with (
        bundle.store() as store,
        tqdm(desc="load", unit="embedding", total=len(embeddings), disable=not progress) as bar,
    ):
        step = max(1, _INSERT_BYTES // (4 * embeddings.dim))
        for start in range(0, len(embeddings), step):
            positions = np.arange(start, min(start + step, len(embeddings)))
            rows = embeddings.rows_N[positions].tolist()
            named = dict(zip(rows, store.by_rows(rows), strict=True))
            batch = [
                _base_row(position, named[row], embedding_D)
                for position, row, embedding_D in zip(positions.tolist(), rows, embeddings.at(positions), strict=True)
            ]
            client.insert(name, batch)
            bar.update(len(batch))


def _base_row(position: int, entity: StoredEntity, embedding_D: Float32Array) -> dict[str, Any]:
    return {
        "pk": position,
        "row": entity.row,
        "key": hashed(entity.entity_id),
        "types": [hashed(kind) for kind in entity.types],
        "words": [],  # titles of the bundle are looked for in its own store
        "record": "",
        "thumbnail": "",
        "embedding": embedding_D,
    }


def _schema(client: MilvusClient, dim: int) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("pk", DataType.INT64, is_primary=True)
    schema.add_field("row", DataType.INT64)
    schema.add_field("key", DataType.INT64)
    for name in ("types", "words"):
        schema.add_field(name, DataType.ARRAY, element_type=DataType.INT64, max_capacity=4096)
    for name in ("record", "thumbnail"):
        schema.add_field(name, DataType.VARCHAR, max_length=RECORD_BYTES)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
    return schema


def _counters_schema(client: MilvusClient) -> Any:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("writer", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("changes", DataType.INT64)
    schema.add_field("added", DataType.INT64)
    schema.add_field("nothing", DataType.FLOAT_VECTOR, dim=_DUMMY_DIM)
    return schema


def _index_and_load(client: MilvusClient, name: str, index_type: str, parameters: Mapping[str, int]) -> None:
    vector = "embedding" if not name.endswith("_changes") else "nothing"
    wanted = client.prepare_index_params()
    wanted.add_index(field_name=vector, index_type=index_type, metric_type="COSINE", params=dict(parameters))
    if vector == "embedding":
        for field in ("key", "row"):
            wanted.add_index(field_name=field, index_type="INVERTED")
    client.create_index(name, wanted)
    client.load_collection(name)


def _index(factory: str) -> tuple[str, dict[str, int]]:
    for pattern, index_type in _INDEXES.items():
        if (match := re.fullmatch(pattern, factory)) is not None:
            given = match.groupdict()
            if index_type == "HNSW":
                return index_type, {"M": int(given["links"] or 32), "efConstruction": 200}
            return index_type, {"nlist": int(given["lists"])} if index_type == "IVF_FLAT" else {}
    raise UserError(
        f"--factory {factory!r} is none that keeps true cosines in Milvus; take auto, Flat, HNSW32 or IVF1024,Flat"
    )


def _address(uri: str) -> tuple[str, str]:
    """The address without user and password, and those as Milvus takes them."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        netloc = host if parts.port is None else f"{host}:{parts.port}"
        token = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        return urlunsplit((parts.scheme, netloc, parts.path, parts.query, "")), token
    if not parts.scheme and uri.endswith(".db"):
        return uri, ""
    raise UserError(
        "a Milvus URI is http://[USER:PASSWORD@]HOST:PORT, https://..., or a file PATH.db; give one of them"
    )


def _reason(error: Exception) -> str:
    text = getattr(error, "message", "") or str(error)
    return str(text).splitlines()[0] if text else type(error).__name__


def beginnings_filter(query_words: Sequence[str]) -> str:
    """A filter for titles in which each of these begins a word."""
    return f"array_contains_all(words, [{', '.join(str(hashed(word)) for word in query_words)}])"


def types_filter(types: Sequence[str]) -> str:
    """A filter for entities with one of these types or more."""
    return f"array_contains_any(types, [{', '.join(str(hashed(kind)) for kind in types)}])"


def not_loaded(bundle: Bundle) -> BundleError:
    return BundleError(
        f"Milvus holds no whole collection of bundle {bundle.name}; load it with `wikiclip index --backend milvus`"
    )
