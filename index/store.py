"""The entity store: one SQLite file of entity records, with a full-text index of the titles."""

import itertools
import json
import re
import sqlite3
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, TypeAdapter

from core.arrays import BoolArray
from core.errors import BundleAltered, BundleIncomplete, UnknownEntity
from core.files import atomic_write
from index.levels import TypeLevels
from index.types import TypeHierarchy, TypeParents

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
# These two are only in stores with credits, or with parents of types, so that others keep their bytes.
CREDIT_TABLE = "CREATE TABLE IF NOT EXISTS credit (row INTEGER PRIMARY KEY, credits TEXT NOT NULL)"
TYPE_TABLE = "CREATE TABLE type (type TEXT PRIMARY KEY, label TEXT NOT NULL, parents TEXT NOT NULL)"
INDEXES = """
CREATE UNIQUE INDEX entity_by_id ON entity (entity_id);
CREATE INDEX entity_by_title ON entity (title COLLATE NOCASE);
CREATE INDEX entity_by_types ON entity (types);
"""
_COLUMNS = (
    "entity.row, entity_id, entity.title, titles, description, url, types, symbol, image_count, has_text, text, "
    "EXISTS (SELECT 1 FROM thumbnail WHERE thumbnail.row = entity.row) AS has_thumbnail"
)
_CREDITS = ", (SELECT credits FROM credit WHERE credit.row = entity.row) AS image_credits"
_MAX_DESCRIPTION = 200  # characters
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")
_MAX_RANKED = 10_000  # title matches
_LISTED = "IN (SELECT value FROM json_each(?))"  # no limit, as there is on the variables of a statement
_CACHED_ENTITIES, _CACHED_TEXT = 2048, 4096  # characters
_CACHED_SELECTIONS = 32  # one byte per entity each
# Only a file made for it has a statement that takes so long, or values so large.
_MAX_OPENING_S, _MAX_STATEMENT_S = 10.0, 60.0
_STEPS = 1_000_000  # of SQLite's virtual machine between two looks at the clock
_MAX_VALUE_BYTES = 256 * 1024**2

AttendedWords = tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """A filter on entity rows: `allowed_E` bool [E]. Searches that share a selection object can be batched."""

    types: tuple[str, ...]
    allowed_E: BoolArray


@dataclass(frozen=True, kw_only=True)
class StoredEntity:
    """An entity record of a bundle. `titles` are by language. `text` is None unless the bundle stores texts.

    `image_credits` has an entry per image, or none at all.

    `attended_words` are the words of the text with the most attention in the adaptor: (start, end, weight). They are
    stored with the record but read separately, by `EntityStore.attended_words`. `has_thumbnail` is set on reading.
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
    image_credits: tuple[Mapping[str, str] | None, ...] = ()
    attended_words: Annotated[AttendedWords, Field(alias="heard")] = ()
    has_thumbnail: bool = False


ENTITY_JSON = TypeAdapter(StoredEntity)  # names the attended words `heard`


def write_store(
    path: Path, entities: Iterable[tuple[StoredEntity, bytes | None]], types: Sequence[TypeParents] = ()
) -> None:
    """Write entities, each with its WebP thumbnail or None, to a new store. Equal content gives equal bytes.

    `types` has one row per type.
    """
    with atomic_write(path) as temporary:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            # No journal: the file gets its name when it is complete.
            connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
            connection.execute("BEGIN")
            for entity, thumbnail in entities:
                insert_entity(connection, entity, thumbnail)
            if types:
                connection.execute(TYPE_TABLE)
                rows = ((each.type, each.label, json.dumps(each.parents, ensure_ascii=False)) for each in types)
                connection.executemany("INSERT INTO type VALUES (?, ?, ?)", rows)
            connection.executescript(INDEXES)  # commits first
            connection.execute("INSERT INTO title_search (title_search) VALUES ('optimize')")
            connection.execute("VACUUM")
        finally:
            connection.close()


def insert_entity(connection: sqlite3.Connection, entity: StoredEntity, thumbnail: bytes | None) -> None:
    """Add an entity whose row and id are not in use."""
    titles = json.dumps(dict(entity.titles), ensure_ascii=False)
    types = json.dumps(entity.types, ensure_ascii=False)
    connection.execute(
        "INSERT INTO entity VALUES (:row, :entity_id, :title, :titles, :description, :url, :types, :symbol, "
        ":image_count, :has_text, :text)",
        {**vars(entity), "titles": titles, "types": types},
    )
    connection.execute(
        "INSERT INTO title_search (rowid, title, other_titles) VALUES (?, ?, ?)",
        (entity.row, entity.title, _other_titles(entity)),
    )
    if entity.attended_words:
        connection.execute("INSERT INTO heard VALUES (?, ?)", (entity.row, json.dumps(entity.attended_words)))
    if any(entity.image_credits):
        connection.execute(CREDIT_TABLE)
        credits = json.dumps(entity.image_credits, ensure_ascii=False)
        connection.execute("INSERT INTO credit VALUES (?, ?)", (entity.row, credits))
    if thumbnail is not None:
        connection.execute("INSERT INTO thumbnail VALUES (?, ?)", (entity.row, thumbnail))


def remove_entity(connection: sqlite3.Connection, entity: StoredEntity) -> None:
    """Remove an entity, given as it is stored."""
    # A full-text table without content needs the indexed text to delete it.
    connection.execute(
        "INSERT INTO title_search (title_search, rowid, title, other_titles) VALUES ('delete', ?, ?, ?)",
        (entity.row, entity.title, _other_titles(entity)),
    )
    connection.execute("DELETE FROM thumbnail WHERE row = ?", (entity.row,))
    connection.execute("DELETE FROM entity WHERE row = ?", (entity.row,))


def select_entities(
    connection: sqlite3.Connection, clause: str, parameters: Sequence[object] = (), *, with_credits: bool = False
) -> list[StoredEntity]:
    """Return the entities that match an SQL clause after `FROM entity`. The row factory must be `sqlite3.Row`."""
    found = connection.execute(f"SELECT {_COLUMNS}{_CREDITS * with_credits} FROM entity {clause}", parameters)
    return [_entity(**dict(values)) for values in found]


def _entity(
    *, titles: str, types: str, has_text: int, has_thumbnail: int, image_credits: str | None = None, **columns: Any
) -> StoredEntity:
    return StoredEntity(
        image_credits=tuple(json.loads(image_credits or "[]")),
        titles=json.loads(titles),
        types=tuple(json.loads(types)),
        has_text=bool(has_text),
        has_thumbnail=bool(has_thumbnail),
        **columns,
    )


class EntityStore:
    """Read access to a store from any thread. Each thread has its own connection.

    A bundle's store is `immutable`, and recently read rows are cached. The live store changes, and every read sees all
    committed changes. A statement that takes too long fails, so that no file can block its reader. Raise
    `BundleIncomplete` if the file is missing, `BundleAltered` if it is not a store. `types` is the hierarchy of types.
    """

    def __init__(self, path: Path, *, immutable: bool = True) -> None:
        self._path = path.resolve()  # threads open it later, and links change
        self._immutable = immutable
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._cache: dict[int, StoredEntity] = {}
        self._selections: dict[tuple[str, ...], Selection] = {}
        self._max_statement_s = _MAX_OPENING_S
        if not path.is_file():
            raise BundleIncomplete(f"{path} is missing; export the bundle again")
        try:
            # Only tables and indexes have pages: views, triggers and virtual tables would run what they say.
            others = "SELECT type || ' ' || name FROM sqlite_master WHERE rootpage = 0 AND name != 'title_search'"
            if (other := self._execute(others).fetchone()) is not None:
                raise sqlite3.DatabaseError(f"it contains the {other[0]}")
            # Rows count from 0 without gaps.
            (self._count,) = self._execute("SELECT coalesce(max(row) + 1, 0) FROM entity").fetchone()
            self._execute("SELECT row FROM thumbnail LIMIT 1").fetchone()
            tables = {name for (name,) in self._execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            self._has_attended_words, self._has_credits = "heard" in tables, "credit" in tables
            self.types = TypeHierarchy(self._read_types() if "type" in tables else ())
            self._max_statement_s = _MAX_STATEMENT_S
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:  # the last two: malformed types
            self.close()
            raise BundleAltered(f"{path} is not an entity store: {error}; export the bundle again") from error

    def __len__(self) -> int:
        return int(self._count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections of all threads. No thread may be using the store."""
        with self._lock:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self._local = threading.local()

    def get(self, entity_id: str) -> StoredEntity:
        """Return the entity with that id. Raise `UnknownEntity`."""
        found = self._select("WHERE entity_id = ?", (_storable(entity_id),))
        if not found:
            raise unknown_entity(entity_id)
        return found[0]

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]:
        """Return the entities at those rows, in that order. Raise `IndexError` for a row outside the store."""
        if (cached := self.cached(rows)) is not None:
            return cached
        rows = [int(row) for row in rows]
        found = {row: entity for row in rows if (entity := self._cache.get(row)) is not None}
        missing = [row for row in rows if row not in found]
        read = {entity.row: entity for entity in self._select(f"WHERE row {_LISTED}", (json.dumps(missing),))}
        found |= read
        if self._immutable:
            short = {row: entity for row, entity in read.items() if len(entity.text or "") <= _CACHED_TEXT}
            if len(self._cache) + len(short) > _CACHED_ENTITIES:
                self._cache.clear()
            self._cache.update(itertools.islice(short.items(), _CACHED_ENTITIES))  # atomic, so no lock is needed
        if unknown := set(missing) - found.keys():
            raise IndexError(f"no entity at row {min(unknown)}, the store has {len(self)}")
        return [found[row] for row in rows]

    def cached(self, rows: Sequence[int]) -> list[StoredEntity] | None:
        """Return what `by_rows` does if all of it is in memory, otherwise None."""
        found = [entity for row in rows if (entity := self._cache.get(row)) is not None]
        return found if len(found) == len(rows) else None

    def by_ids(self, entity_ids: Sequence[str]) -> dict[str, StoredEntity]:
        """Return those of the entities that exist, by id."""
        listed = json.dumps([_storable(entity_id) for entity_id in entity_ids])
        return {entity.entity_id: entity for entity in self._select(f"WHERE entity_id {_LISTED}", (listed,))}

    def sample(self, count: int) -> list[StoredEntity]:
        """Return up to `count` entities, spread evenly over the rows."""
        return self.by_rows(np.linspace(0, len(self) - 1, min(count, len(self)), dtype=np.int64).tolist())

    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]:
        """Return up to `limit` entities: titles equal to the query first, then prefix matches, then word matches.

        Word matches ignore case and accents, include titles in other languages, and allow an unfinished last word.
        """
        return distinct(itertools.chain.from_iterable(self.title_matches(query, limit)), limit)

    def title_matches(self, query: str, limit: int) -> Iterator[list[StoredEntity]]:
        """Yield the three kinds of match of `search_titles`, up to `limit` each. An entity may be in several."""
        text = " ".join(_storable(query).replace("\0", " ").split())
        if not text or limit < 1:
            return
        yield self._select("WHERE title = ? COLLATE NOCASE ORDER BY row LIMIT ?", (text, limit))
        yield self._select(
            "WHERE title >= ? COLLATE NOCASE AND title < ? COLLATE NOCASE ORDER BY title COLLATE NOCASE, row LIMIT ?",
            (text, text + "\U0010ffff", limit),
        )
        # A phrase without a letter or digit has no token and would match nothing.
        words = [word for word in text.split() if any(character.isalnum() for character in word)]
        if words:
            phrases = " ".join('"' + word.replace('"', '""') + '"' for word in words) + "*"
            yield self._word_matches(phrases, limit)

    def _word_matches(self, phrases: str, limit: int) -> list[StoredEntity]:
        """Return titles that match, best first. Ranking millions takes minutes: then the shortest of some."""
        some = "SELECT rowid FROM title_search WHERE title_search MATCH ? LIMIT ?"
        (count,) = self._execute(f"SELECT count(*) FROM ({some})", (phrases, _MAX_RANKED + 1)).fetchone()
        if count > _MAX_RANKED:
            return self._select(
                f"WHERE row IN ({some}) ORDER BY length(title), row LIMIT ?", (phrases, _MAX_RANKED, limit)
            )
        return self._select(
            "JOIN title_search ON title_search.rowid = entity.row WHERE title_search MATCH ? "
            "ORDER BY bm25(title_search, 10.0, 1.0), length(entity.title), entity.row LIMIT ?",
            (phrases, limit),
        )

    def select(self, types: Sequence[str]) -> Selection:
        """Select the entities with any of `types`, or a descendant of one. Recent selections are cached.

        The first call takes about a second for millions of entities.
        """
        types = tuple(types)
        if (cached := self._selections.get(types)) is not None:
            return cached
        names = self.types.names_below(types)
        matching = [text for text in self._type_lists if not names.isdisjoint(json.loads(text))]
        allowed_E = np.zeros(len(self), np.bool_)
        found = self._execute(f"SELECT row FROM entity WHERE types {_LISTED}", (json.dumps(matching),))
        allowed_E[np.fromiter((values[0] for values in found), np.int64)] = True
        if len(self._selections) >= _CACHED_SELECTIONS:
            self._selections.clear()
        return self._selections.setdefault(types, Selection(types, allowed_E))

    def _read_types(self) -> Iterator[TypeParents]:
        for key, label, parents in self._execute("SELECT type, label, parents FROM type ORDER BY rowid"):
            yield TypeParents(type=key, label=label, parents=tuple(map(str, json.loads(parents))))

    @cached_property
    def type_levels(self) -> TypeLevels:
        """The types that can be a level. Takes seconds for millions of entities."""
        sizes: Counter[str] = Counter()
        for types, count in self._execute("SELECT types, count(*) FROM entity GROUP BY types"):
            sizes.update(dict.fromkeys(self.types.ancestors(tuple(json.loads(types))), count))
        return TypeLevels(self.types, sizes, len(self))

    @cached_property
    def _type_lists(self) -> list[str]:
        """The distinct lists of types, as JSON."""
        return [values[0] for values in self._execute("SELECT DISTINCT types FROM entity")]

    def thumbnail(self, entity_id: str) -> bytes | None:
        """Return the entity's WebP thumbnail, if it has one. Raise `UnknownEntity`."""
        row = self.get(entity_id).row
        return self.thumbnails([row]).get(row)

    def thumbnails(self, rows: Sequence[int]) -> dict[int, bytes]:
        """Return the WebP thumbnails of those rows that have one."""
        found = self._execute(f"SELECT row, webp FROM thumbnail WHERE row {_LISTED}", (json.dumps(rows),))
        return {row: bytes(webp) for row, webp in found}

    def attended_words(self, row: int) -> AttendedWords:
        """Return the words of an entity's text with the most attention, as (start, end, weight), heaviest first.

        Empty if the bundle stores no texts, or is older than this table.
        """
        if not self._has_attended_words:
            return ()
        found = self._execute("SELECT words FROM heard WHERE row = ?", (row,)).fetchone()
        return () if found is None else tuple((start, end, weight) for start, end, weight in json.loads(found[0]))

    def _select(self, clause: str, parameters: Sequence[object]) -> list[StoredEntity]:
        return select_entities(self._connection(), clause, parameters, with_credits=self._has_credits)

    def _execute(self, statement: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        return self._connection().execute(statement, parameters)

    def _connection(self) -> sqlite3.Connection:
        """Return this thread's connection, for a statement that starts now."""
        self._local.started_at = time.monotonic()
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # `immutable` skips locks and checks for changes.
            uri = self._path.as_uri() + ("?mode=ro&immutable=1" if self._immutable else "?mode=ro")
            connection = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.executescript("PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON; PRAGMA query_only = ON")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            local = self._local  # of this thread, as the connection
            connection.set_progress_handler(lambda: time.monotonic() - local.started_at > self._max_statement_s, _STEPS)
            self._local.connection = connection
            with self._lock:
                self._connections.append(connection)
        return connection


def distinct(entities: Iterable[StoredEntity], limit: int) -> list[StoredEntity]:
    """Return the first `limit` different entities, in order."""
    found: dict[int, StoredEntity] = {}
    for entity in entities:
        found.setdefault(entity.row, entity)
        if len(found) == limit:
            break
    return list(found.values())


def words(text: str) -> list[str]:
    """Return the words of a title or query without case and accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return re.findall(r"\w+", plain)


def matched_language(entity: StoredEntity, query: str) -> str | None:
    """Return the language of a title that has the query's words, None if the default title has them or no title does.

    As in `EntityStore.search_titles`, the last word may be unfinished.
    """
    *complete, last = words(query) or [""]

    def matches(title: str) -> bool:
        title_words = words(title)
        return set(complete) <= set(title_words) and any(word.startswith(last) for word in title_words)

    if matches(entity.title):
        return None
    return next((language for language, title in entity.titles.items() if matches(title)), None)


def unknown_entity(entity_id: str) -> UnknownEntity:
    return UnknownEntity(f"no entity {entity_id!r} in this bundle; search by title to find its id")


def describe(title: str, text: str) -> str | None:
    """Return the first sentence of a text, cut at 200 characters, or None if the text is blank or only the title."""
    stripped = text.strip()
    if stripped in ("", title):
        return None
    sentence = _SENTENCE_END.split(stripped, maxsplit=1)[0].strip()
    if len(sentence) <= _MAX_DESCRIPTION:
        return sentence
    return sentence[: _MAX_DESCRIPTION - 1].rsplit(" ", 1)[0].rstrip(",;: ") + "…"


def _other_titles(entity: StoredEntity) -> str:
    return "\n".join(title for title in dict.fromkeys(entity.titles.values()) if title != entity.title)


def _storable(text: str) -> str:
    """Replace lone surrogates, which SQLite refuses. No stored text has one."""
    return text.encode("utf-8", "replace").decode()
