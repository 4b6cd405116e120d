"""The entity store: one SQLite file with the records by row and by entity_id, and full-text title search."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from core.errors import BundleAltered, BundleIncomplete, UnknownEntity
from core.files import atomic_write
from index.selection import Selection

SCHEMA = """
CREATE TABLE entity (
    row INTEGER PRIMARY KEY,
    entity_id TEXT NOT NULL,
    title TEXT NOT NULL,
    titles TEXT NOT NULL,
    description TEXT,
    url TEXT,
    types TEXT NOT NULL,
    symbol TEXT,
    image_count INTEGER NOT NULL,
    has_text INTEGER NOT NULL,
    text TEXT
);
CREATE TABLE thumbnail (row INTEGER PRIMARY KEY, webp BLOB NOT NULL);
CREATE TABLE heard (row INTEGER PRIMARY KEY, words TEXT NOT NULL);
CREATE VIRTUAL TABLE title_search USING fts5(
    title, other_titles, content='', tokenize='unicode61 remove_diacritics 2', prefix='2 3'
);
"""
INDEXES = """
CREATE UNIQUE INDEX entity_by_id ON entity (entity_id);
CREATE INDEX entity_by_title ON entity (title COLLATE NOCASE);
CREATE INDEX entity_by_types ON entity (types);
"""
_OPTIMIZE = """
INSERT INTO title_search (title_search) VALUES ('optimize');
"""
_MAX_DESCRIPTION = 200  # characters
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
Value = TypeVar("Value")
_COLUMNS = (
    "entity.row, entity_id, entity.title, titles, description, url, types, symbol, image_count, has_text, text, "
    "EXISTS (SELECT 1 FROM thumbnail WHERE thumbnail.row = entity.row) AS has_thumbnail"
)
_RANKED_AT_MOST = 10_000  # titles with the words asked for
_ROWS_PER_QUERY = 500  # SQLite limits the variables of one statement
_KEPT, _KEPT_TEXT = 2048, 4096  # entities in memory of a store that never changes, and characters of text of one


@dataclass(frozen=True, kw_only=True)
class StoredEntity:
    """An entity as a bundle holds it: `titles` by language, `text` only where the bundle was told to keep it.

    `heard` are the words of the text that the adaptor listened to most, as (start, end, weight). They go into a store
    with the entity, and come out by `heard` alone. `has_thumbnail` is said by the store that an entity comes out of.
    """

    row: int
    entity_id: str
    title: str
    titles: Mapping[str, str]
    description: str | None
    url: str | None
    types: tuple[str, ...]
    symbol: str | None
    image_count: int
    has_text: bool
    text: str | None = None
    heard: tuple[tuple[int, int, float], ...] = ()
    has_thumbnail: bool = False


def write_store(path: Path, entities: Iterable[tuple[StoredEntity, bytes | None]]) -> None:
    """Write entities, each with its WebP thumbnail or None, durably to a new store at `path`.

    One pass, one transaction for all rows and a VACUUM: the same entities give the same bytes.
    """
    with atomic_write(path) as temporary:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            # The file is not visible under its own name until it is whole, so no journal is needed.
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
            connection.execute("BEGIN")
            for entity, thumbnail in entities:
                insert_entity(connection, entity, thumbnail)
            connection.executescript(INDEXES + _OPTIMIZE)  # commits first
            connection.execute("VACUUM")
        finally:
            connection.close()


def insert_entity(connection: sqlite3.Connection, entity: StoredEntity, thumbnail: bytes | None) -> None:
    """Add an entity to a store that is open for writing; its row and its id are not in use."""
    connection.execute(
        "INSERT INTO entity VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            entity.row,
            entity.entity_id,
            entity.title,
            json.dumps(dict(entity.titles), ensure_ascii=False),
            entity.description,
            entity.url,
            json.dumps(entity.types, ensure_ascii=False),
            entity.symbol,
            entity.image_count,
            entity.has_text,
            entity.text,
        ),
    )
    connection.execute(
        "INSERT INTO title_search (rowid, title, other_titles) VALUES (?, ?, ?)",
        (entity.row, entity.title, _other_titles(entity)),
    )
    if entity.heard:
        connection.execute("INSERT INTO heard VALUES (?, ?)", (entity.row, json.dumps(entity.heard)))
    if thumbnail is not None:
        connection.execute("INSERT INTO thumbnail VALUES (?, ?)", (entity.row, thumbnail))


def remove_entity(connection: sqlite3.Connection, entity: StoredEntity) -> None:
    """Take an entity, as it stands there, out of a store that is open for writing."""
    # The full-text table keeps no content: what it is to forget has to be told.
    connection.execute(
        "INSERT INTO title_search (title_search, rowid, title, other_titles) VALUES ('delete', ?, ?, ?)",
        (entity.row, entity.title, _other_titles(entity)),
    )
    connection.execute("DELETE FROM thumbnail WHERE row = ?", (entity.row,))
    connection.execute("DELETE FROM entity WHERE row = ?", (entity.row,))


def select_entities(
    connection: sqlite3.Connection, clause: str, parameters: Sequence[object] = ()
) -> list[StoredEntity]:
    """The entities that an SQL clause after `FROM entity` names. The connection's rows are `sqlite3.Row`."""
    found = connection.execute(f"SELECT {_COLUMNS} FROM entity {clause}", parameters)
    return [_entity(values) for values in found]


def _other_titles(entity: StoredEntity) -> str:
    return "\n".join(title for title in dict.fromkeys(entity.titles.values()) if title != entity.title)


class EntityStore:
    """Read-only access to a store, from any number of threads: each gets a connection of its own.

    A bundle's store never changes (`immutable`), and what was asked for by row lately is kept in memory; a live one
    does, and each question sees all that was committed.
    Raises `BundleIncomplete` where there is no file, `BundleAltered` where it is no store.
    """

    def __init__(self, path: Path, *, immutable: bool = True) -> None:
        self._path = path
        self._immutable = immutable
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._kept: dict[int, StoredEntity] = {}
        if not path.is_file():
            raise BundleIncomplete(f"{path} is missing; export the bundle again")
        try:
            # The bundle never changes, so a maximum asked for once holds: `row` is dense from 0.
            (self._count,) = self._connection().execute("SELECT coalesce(max(row) + 1, 0) FROM entity").fetchone()
            self._connection().execute("SELECT row FROM thumbnail LIMIT 1").fetchone()
            tables = self._connection().execute("SELECT name FROM sqlite_master WHERE name = 'heard'")
            self._has_heard = tables.fetchone() is not None
        except sqlite3.DatabaseError as error:
            self.close()
            raise BundleAltered(f"{path} is no entity store: {error}; export the bundle again") from error

    def __len__(self) -> int:
        return int(self._count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every thread's connection. No thread may be using the store."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._local = threading.local()

    def get(self, entity_id: str) -> StoredEntity:
        """The entity of that id. Raises `UnknownEntity`."""
        found = self._select("WHERE entity_id = ?", (_storable(entity_id),))
        if not found:
            raise _unknown(entity_id)
        return found[0]

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """The entities of those rows, in the order asked for. A row outside the store is an `IndexError`."""
        if (kept := self.kept(rows)) is not None:
            return kept
        wanted = [int(row) for row in rows]
        found = {row: entity for row in wanted if (entity := self._kept.get(row)) is not None}
        for part in _parts([row for row in wanted if row not in found]):
            marks = ",".join("?" * len(part))
            read = {entity.row: entity for entity in self._select(f"WHERE row IN ({marks})", part)}
            found |= read
            self._keep({row: each for row, each in read.items() if len(each.text or "") <= _KEPT_TEXT})
        if missing := set(wanted) - found.keys():
            raise IndexError(f"no entity at row {min(missing)}, the store has {len(self)}")
        return [found[row] for row in wanted]

    def kept(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        """What `by_rows` gives where all of it is in memory; None where a file would have to be asked."""
        found = [entity for row in rows if (entity := self._kept.get(row)) is not None]
        return found if len(found) == len(rows) else None

    def by_ids(self, entity_ids: Sequence[str]) -> dict[str, StoredEntity]:
        """Those of the entities that are there, by id."""
        found: dict[str, StoredEntity] = {}
        for part in _parts([_storable(entity_id) for entity_id in entity_ids]):
            marks = ",".join("?" * len(part))
            found.update((entity.entity_id, entity) for entity in self._select(f"WHERE entity_id IN ({marks})", part))
        return found

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Up to `limit` entities whose title fits any user text: equal first, then starting so, then with those words.

        Case and accents do not matter to words; the last word may be unfinished; titles in other languages count too.
        """
        return distinct(itertools.chain.from_iterable(self.title_matches(query, limit)), limit)

    def title_matches(self, query: str, limit: int) -> Iterator[list[StoredEntity]]:
        """The three kinds of match of `search_titles`, up to `limit` each; an entity may be in several."""
        text = " ".join(_storable(query).replace("\0", " ").split())
        if not text or limit < 1:
            return
        yield self._select("WHERE title = ? COLLATE NOCASE ORDER BY row LIMIT ?", (text, limit))
        yield self._select(
            "WHERE title >= ? COLLATE NOCASE AND title < ? COLLATE NOCASE ORDER BY title COLLATE NOCASE, row LIMIT ?",
            (text, text + "\U0010ffff", limit),
        )
        # A phrase without a letter or digit has no token, and would make the whole match empty.
        words = [word for word in text.split() if any(character.isalnum() for character in word)]
        if words:
            phrases = " ".join('"' + word.replace('"', '""') + '"' for word in words) + "*"
            yield self._with_words(phrases, limit)

    def _with_words(self, phrases: str, limit: int) -> list[StoredEntity]:
        """Titles that match, best first; where millions do, the shortest of some: ranking all would take minutes."""
        some = "SELECT rowid FROM title_search WHERE title_search MATCH ? LIMIT ?"
        found = self._connection().execute(f"SELECT count(*) FROM ({some})", (phrases, _RANKED_AT_MOST + 1)).fetchone()
        if found[0] > _RANKED_AT_MOST:
            return self._select(
                f"WHERE row IN ({some}) ORDER BY length(title), row LIMIT ?", (phrases, _RANKED_AT_MOST, limit)
            )
        return self._select(
            "JOIN title_search ON title_search.rowid = entity.row WHERE title_search MATCH ? "
            "ORDER BY bm25(title_search, 10.0, 1.0), length(entity.title), entity.row LIMIT ?",
            (phrases, limit),
        )

    def select(self, types: Sequence[str]) -> Selection:
        """The entities that have one of `types` or more. With millions of entities a matter of a second: keep it."""
        wanted = set(types)
        fitting = [text for text in self._types_texts if not wanted.isdisjoint(json.loads(text))]
        allowed_E = np.zeros(len(self), np.bool_)
        for part in _parts(fitting):
            marks = ",".join("?" * len(part))
            found = self._connection().execute(f"SELECT row FROM entity WHERE types IN ({marks})", part)
            allowed_E[np.fromiter((values[0] for values in found), np.int64)] = True
        return Selection(tuple(types), allowed_E)

    @cached_property
    def _types_texts(self) -> list[str]:
        """Each combination of types that entities have, as it is stored."""
        return [values[0] for values in self._connection().execute("SELECT DISTINCT types FROM entity")]

    def thumbnail(self, entity_id: str) -> bytes | None:
        """The WebP thumbnail of an entity, None where the bundle has none. Raises `UnknownEntity`."""
        # One statement, so that a store which changes meanwhile cannot give half an answer.
        found = self._connection().execute(
            "SELECT webp FROM entity LEFT JOIN thumbnail USING (row) WHERE entity_id = ?", (_storable(entity_id),)
        )
        values = found.fetchone()
        if values is None:
            raise _unknown(entity_id)
        return None if values["webp"] is None else bytes(values["webp"])

    def heard(self, row: int) -> tuple[tuple[int, int, float], ...]:
        """The words of an entity's text that the adaptor listened to, as (start, end, weight), heaviest first.

        Empty where the bundle keeps no texts, or was made before these were kept.
        """
        if not self._has_heard:
            return ()
        found = self._connection().execute("SELECT words FROM heard WHERE row = ?", (row,)).fetchone()
        return () if found is None else tuple((start, end, weight) for start, end, weight in json.loads(found[0]))

    def thumbnails(self, rows: Sequence[int]) -> dict[int, bytes]:
        """The WebP thumbnails of those rows that have one."""
        found: dict[int, bytes] = {}
        for part in _parts(rows):
            marks = ",".join("?" * len(part))
            query = f"SELECT row, webp FROM thumbnail WHERE row IN ({marks})"
            found.update((values["row"], bytes(values["webp"])) for values in self._connection().execute(query, part))
        return found

    def _keep(self, read: Mapping[int, StoredEntity]) -> None:
        """Any thread may: each step is atomic, and what is forgotten is read again."""
        if self._immutable:
            if len(self._kept) + len(read) > _KEPT:
                self._kept.clear()
            self._kept.update(itertools.islice(read.items(), _KEPT))

    def _select(self, clause: str, parameters: Sequence[object]) -> list[StoredEntity]:
        return select_entities(self._connection(), clause, parameters)

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # Immutable: no locks and no look at the disk for a change that never comes.
            uri = self._path.resolve().as_uri() + ("?mode=ro&immutable=1" if self._immutable else "?mode=ro")
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            connection.row_factory = sqlite3.Row
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection


def distinct(entities: Iterable[StoredEntity], limit: int) -> list[StoredEntity]:
    """The first `limit` entities in their order, each once; no more are taken than that needs."""
    found: dict[int, StoredEntity] = {}
    for entity in entities:
        found.setdefault(entity.row, entity)
        if len(found) == limit:
            break
    return list(found.values())


def _entity(values: sqlite3.Row) -> StoredEntity:
    return StoredEntity(
        row=values["row"],
        entity_id=values["entity_id"],
        title=values["title"],
        titles=json.loads(values["titles"]),
        description=values["description"],
        url=values["url"],
        types=tuple(json.loads(values["types"])),
        symbol=values["symbol"],
        image_count=values["image_count"],
        has_text=bool(values["has_text"]),
        text=values["text"],
        has_thumbnail=bool(values["has_thumbnail"]),
    )


def _unknown(entity_id: str) -> UnknownEntity:
    return UnknownEntity(f"no entity {entity_id!r} in this bundle; look for it by title")


def _parts(values: Sequence[Value]) -> Iterator[Sequence[Value]]:
    for start in range(0, len(values), _ROWS_PER_QUERY):
        yield values[start : start + _ROWS_PER_QUERY]


def _storable(text: str) -> str:
    """A user's text may hold lone surrogates, which SQLite refuses; no stored text has one, so `?` finds as little."""
    return text.encode("utf-8", "replace").decode()


def first_sentence(text: str) -> str | None:
    """Return the first sentence of a text, cut at 200 characters, or None if the text is blank."""
    stripped = text.strip()
    if not stripped:
        return None
    sentence = _SENTENCE_END.split(stripped, maxsplit=1)[0].strip()
    if len(sentence) <= _MAX_DESCRIPTION:
        return sentence
    return sentence[: _MAX_DESCRIPTION - 1].rsplit(" ", 1)[0].rstrip(",;: ") + "…"
