"""The entity store: one SQLite file with the records by row and by entity_id, and full-text title search."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from core.errors import BundleAltered, BundleIncomplete, UnknownEntity
from core.files import durable

_SCHEMA = """
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
CREATE VIRTUAL TABLE title_search USING fts5(
    title, other_titles, content='', tokenize='unicode61 remove_diacritics 2', prefix='2 3'
);
"""
_INDEXES = """
CREATE UNIQUE INDEX entity_by_id ON entity (entity_id);
CREATE INDEX entity_by_title ON entity (title COLLATE NOCASE);
INSERT INTO title_search (title_search) VALUES ('optimize');
"""
_COLUMNS = "entity.row, entity_id, entity.title, titles, description, url, types, symbol, image_count, has_text, text"
_ROWS_PER_QUERY = 500  # SQLite limits the variables of one statement


@dataclass(frozen=True, kw_only=True)
class StoredEntity:
    """An entity as a bundle holds it: `titles` by language, `text` only where the bundle was told to keep it."""

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


def write_store(path: Path, entities: Iterable[tuple[StoredEntity, bytes | None]]) -> None:
    """Write entities, each with its WebP thumbnail or None, durably to a new store at `path`.

    One pass, one transaction for all rows and a VACUUM: the same entities give the same bytes.
    """
    with durable(path) as temporary:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            # The file is not visible under its own name until it is whole, so no journal is needed.
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _SCHEMA)
            connection.execute("BEGIN")
            for entity, thumbnail in entities:
                _insert(connection, entity, thumbnail)
            connection.executescript(_INDEXES)  # commits first
            connection.execute("VACUUM")
        finally:
            connection.close()


def _insert(connection: sqlite3.Connection, entity: StoredEntity, thumbnail: bytes | None) -> None:
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
    other_titles = "\n".join(title for title in dict.fromkeys(entity.titles.values()) if title != entity.title)
    connection.execute(
        "INSERT INTO title_search (rowid, title, other_titles) VALUES (?, ?, ?)",
        (entity.row, entity.title, other_titles),
    )
    if thumbnail is not None:
        connection.execute("INSERT INTO thumbnail VALUES (?, ?)", (entity.row, thumbnail))


class EntityStore:
    """Read-only access to a store, from any number of threads: each gets a connection of its own.

    Raises `BundleIncomplete` where there is no file, `BundleAltered` where it is no store.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        if not path.is_file():
            raise BundleIncomplete(f"{path} is missing; export the bundle again")
        try:
            # The bundle never changes, so a maximum asked for once holds: `row` is dense from 0.
            (self._count,) = self._connection().execute("SELECT coalesce(max(row) + 1, 0) FROM entity").fetchone()
            self._connection().execute("SELECT row FROM thumbnail LIMIT 1").fetchone()
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
            raise UnknownEntity(f"no entity {entity_id!r} in this bundle; look for it by title")
        return found[0]

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """The entities of those rows, in the order asked for. A row outside the store is an `IndexError`."""
        wanted = [int(row) for row in rows]
        found: dict[int, StoredEntity] = {}
        for start in range(0, len(wanted), _ROWS_PER_QUERY):
            part = wanted[start : start + _ROWS_PER_QUERY]
            marks = ",".join("?" * len(part))
            found.update((entity.row, entity) for entity in self._select(f"WHERE row IN ({marks})", part))
        if missing := set(wanted) - found.keys():
            raise IndexError(f"no entity at row {min(missing)}, the store has {len(self)}")
        return [found[row] for row in wanted]

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Up to `limit` entities whose title fits any user text: equal first, then starting so, then with those words.

        Case and accents do not matter to words; the last word may be unfinished; titles in other languages count too.
        """
        text = " ".join(_storable(query).replace("\0", " ").split())
        if not text or limit < 1:
            return []
        found: dict[int, StoredEntity] = {}
        for entity in self._title_matches(text, limit):
            found.setdefault(entity.row, entity)
            if len(found) == limit:
                break
        return list(found.values())

    def thumbnail(self, entity_id: str) -> bytes | None:
        """The WebP thumbnail of an entity, None where the bundle has none. Raises `UnknownEntity`."""
        row = self.get(entity_id).row
        found = self._connection().execute("SELECT webp FROM thumbnail WHERE row = ?", (row,)).fetchone()
        return None if found is None else bytes(found[0])

    def rows_with_thumbnail(self, rows: Sequence[int]) -> set[int]:
        """Those of a few `rows` that have a thumbnail."""
        marks = ",".join("?" * len(rows))
        found = self._connection().execute(f"SELECT row FROM thumbnail WHERE row IN ({marks})", [int(r) for r in rows])
        return {values["row"] for values in found}

    def _title_matches(self, text: str, limit: int) -> Iterator[StoredEntity]:
        yield from self._select("WHERE title = ? COLLATE NOCASE ORDER BY row LIMIT ?", (text, limit))
        yield from self._select(
            "WHERE title >= ? COLLATE NOCASE AND title < ? COLLATE NOCASE ORDER BY title COLLATE NOCASE, row LIMIT ?",
            (text, text + "\U0010ffff", limit),
        )
        # A phrase without a letter or digit has no token, and would make the whole match empty.
        words = [word for word in text.split() if any(character.isalnum() for character in word)]
        if words:
            phrases = " ".join('"' + word.replace('"', '""') + '"' for word in words)
            yield from self._select(
                "JOIN title_search ON title_search.rowid = entity.row WHERE title_search MATCH ? "
                "ORDER BY bm25(title_search, 10.0, 1.0), length(entity.title), entity.row LIMIT ?",
                (phrases + "*", limit),
            )

    def _select(self, clause: str, parameters: Sequence[object]) -> list[StoredEntity]:

        found = self._connection().execute(f"SELECT {_COLUMNS} FROM entity {clause}", parameters)
        return [_entity(values) for values in found]

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # Immutable: no locks and no look at the disk for a change that never comes.
            uri = self._path.resolve().as_uri() + "?mode=ro&immutable=1"
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            connection.row_factory = sqlite3.Row
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection


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
    )


def _storable(text: str) -> str:
    """A user's text may hold lone surrogates, which SQLite refuses; no stored text has one, so `?` finds as little."""
    return text.encode("utf-8", "replace").decode()
