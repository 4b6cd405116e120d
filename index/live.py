"""Live changes: one SQLite file in LIVE_DIR with the entities that were put and deleted since the bundle was made.

The bundle itself never changes. Every change has a number, its generation; an entity that was put has it as its row.
A change is on disk when the call that makes it returns (WAL, `synchronous = FULL`). Any number of processes of one host
may hold the same folder: they write one after the other, and see each other's changes when they `refresh`.

`base` says which bundles the changes belong to: of each, those after `from_generation` are not in it. `wikiclip index
--compact` adds the bundle that it makes, so that services of the old and of the new one can run side by side; what the
old one needs goes when the new one is compacted in its turn.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.errors import LiveDirError, Unavailable, UnknownEntity
from core.files import sync
from index.bundle import Bundle
from index.delta import Delta, DeltaBuilder, Float32Array
from index.embeddings import normalised
from index.manifest import content_fingerprint
from index.store import INDEXES, SCHEMA, EntityStore, StoredEntity, insert_entity, remove_entity, select_entities
from index.view import Put

LIVE_FILE = "live.sqlite"
_SCHEMA_VERSION = 1
_BUSY_S = 5.0  # a change takes milliseconds; who waits longer than this is told to try again
_LIVE_SCHEMA = """
CREATE TABLE live (generation INTEGER NOT NULL);
INSERT INTO live VALUES (0);
CREATE TABLE base (content TEXT PRIMARY KEY, name TEXT NOT NULL, from_generation INTEGER NOT NULL);
CREATE TABLE embedding (row INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE tombstone (generation INTEGER PRIMARY KEY, entity_id TEXT NOT NULL UNIQUE);
"""


class LiveSegment:
    """The live changes to one bundle. Safe for several threads.

    Raises `LiveDirError` where the folder cannot be used or holds changes to another bundle.
    """

    look_every_s = 0.1

    def __init__(self, folder: Path, bundle: Bundle, base: EntityStore) -> None:
        self._content = content_fingerprint(bundle.manifest)
        self._name = bundle.name
        self._base = base
        self._base_count = len(base)
        self._builder = DeltaBuilder(bundle.manifest.embedding_dim)
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer = _open(folder)
        path = folder / LIVE_FILE
        self._reader = _connect(path)
        self.store = EntityStore(path, immutable=False)
        self._seen_version: int | None = None
        try:
            self.from_generation = self._from_generation(self._reader)
            self.folded_count = self._count_folded()
            self._delta = self._builder.delta(self.from_generation)
            self.refresh()
        except LiveDirError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file. No thread may be using it."""
        self.store.close()
        self._reader.close()
        self._writer.close()

    @property
    def delta(self) -> Delta:
        """The changes as of the last `refresh`."""
        return self._delta

    def refresh(self) -> Delta:
        """Take in what any process has changed. Cheap where nothing has.

        Raises `LiveDirError` once the changes belong to this bundle no longer.
        """
        with self._read_lock:
            (version,) = self._reader.execute("PRAGMA data_version").fetchone()
            if version != self._seen_version:
                self._read_changes()
                self._seen_version = version
            return self._delta

    def put(self, entity: StoredEntity, embedding_D: Float32Array, thumbnail: bytes | None) -> Put:
        """Add an entity or replace it; its `row` is given here. On disk when this returns.

        The embedding is finite and not zero. Raises `Unavailable` while others write for too long, `LiveDirError`.
        """
        vector_D = normalised(embedding_D[None])[0].astype("<f2")
        with self._transaction() as connection:
            created = not self._exists(connection, entity.entity_id)
            row = self._next_generation(connection)
            self._forget(connection, entity.entity_id)
            insert_entity(connection, replace(entity, row=row), thumbnail)
            connection.execute("INSERT INTO embedding VALUES (?, ?)", (row, vector_D.tobytes()))
        return Put(delta=self.refresh(), created=created)

    def delete(self, entity_id: str) -> Delta:
        """Take an entity out of the answers. On disk when this returns.

        Raises `UnknownEntity` where there is none, else as `put` does.
        """
        with self._transaction() as connection:
            if not self._exists(connection, entity_id):
                raise UnknownEntity(f"no entity {entity_id!r} here; look for it by title")
            generation = self._next_generation(connection)
            self._forget(connection, entity_id)
            connection.execute("INSERT INTO tombstone VALUES (?, ?)", (generation, entity_id))
        return self.refresh()

    def rebase(self, content: str, name: str, generation: int) -> None:
        """Say that a bundle (its content fingerprint and name) holds the changes up to `generation`.

        What only bundles from before this one's needed is removed. Raises as `put` does.
        """
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO base VALUES (?, ?, ?)", (content, name, generation))
            connection.execute("DELETE FROM base WHERE from_generation < ?", (self.from_generation,))
            (needed_after,) = connection.execute("SELECT min(from_generation) FROM base").fetchone()
            for entity in select_entities(connection, "WHERE row <= ?", (needed_after,)):
                self._forget(connection, entity.entity_id)
            connection.execute("DELETE FROM tombstone WHERE generation <= ?", (needed_after,))

    def thumbnail(self, row: int) -> bytes | None:
        """The WebP thumbnail of an entity that was put, by its row in a delta; None where it has none any more."""
        found = self._read_one("SELECT webp FROM thumbnail WHERE row = ?", row - self._base_count)
        return None if found is None else bytes(found["webp"])

    def _count_folded(self) -> int:
        """Entities in the file that the bundle holds itself by now."""
        found = self._read_one("SELECT count(*) AS folded FROM entity WHERE row <= ?", self.from_generation)
        return 0 if found is None else int(found["folded"])

    def _read_one(self, statement: str, *parameters: object) -> sqlite3.Row | None:
        with self._read_lock:
            found: sqlite3.Row | None = self._reader.execute(statement, parameters).fetchone()
        return found

    def _read_changes(self) -> None:
        last = self._delta.generation
        self._reader.execute("BEGIN")  # one state, whatever is written meanwhile
        try:
            self._from_generation(self._reader)
            (generation,) = self._reader.execute("SELECT generation FROM live").fetchone()
            put = select_entities(self._reader, "WHERE row > ?", (last,))
            after = (last,)
            vectors = dict(self._reader.execute("SELECT row, vector FROM embedding WHERE row > ?", after).fetchall())
            tombstones = self._reader.execute(
                "SELECT generation, entity_id FROM tombstone WHERE generation > ?", after
            ).fetchall()
        finally:
            self._reader.execute("COMMIT")
        changes: list[tuple[int, StoredEntity | str]] = [(entity.row, entity) for entity in put]
        changes += [(number, entity_id) for number, entity_id in tombstones]
        for number, change in sorted(changes, key=lambda item: item[0]):
            if isinstance(change, str):
                self._builder.delete(change, base_row=self._base_row(change))
                continue
            vector_D = np.frombuffer(vectors[number], "<f2").astype(np.float32)
            self._builder.put(
                replace(change, row=self._base_count + number),
                normalised(vector_D[None])[0],
                base_row=self._base_row(change.entity_id),
            )
        self._delta = self._builder.delta(generation)

    def _from_generation(self, connection: sqlite3.Connection) -> int:
        """Up to which generation this bundle holds the changes itself."""
        bases = connection.execute("SELECT content, name, from_generation FROM base").fetchall()
        mine = [int(row["from_generation"]) for row in bases if row["content"] == self._content]
        if bases and not mine:
            raise LiveDirError(
                f"the live changes belong to bundle {bases[-1]['name']!r}, not to the one that is served; serve that "
                "one, fold them into it with `wikiclip index --compact`, or choose another LIVE_DIR"
            )
        return mine[0] if mine else 0

    def _base_row(self, entity_id: str) -> int | None:
        try:
            return self._base.get(entity_id).row
        except UnknownEntity:
            return None

    def _exists(self, connection: sqlite3.Connection, entity_id: str) -> bool:
        after = (entity_id, self.from_generation)
        if connection.execute("SELECT 1 FROM entity WHERE entity_id = ? AND row > ?", after).fetchone():
            return True
        if connection.execute("SELECT 1 FROM tombstone WHERE entity_id = ? AND generation > ?", after).fetchone():
            return False
        return self._base_row(entity_id) is not None

    def _next_generation(self, connection: sqlite3.Connection) -> int:
        self._from_generation(connection)
        if connection.execute("SELECT 1 FROM base").fetchone() is None:  # the first change of all
            connection.execute("INSERT INTO base VALUES (?, ?, 0)", (self._content, self._name))
        connection.execute("UPDATE live SET generation = generation + 1")
        (generation,) = connection.execute("SELECT generation FROM live").fetchone()
        return int(generation)

    @staticmethod
    def _forget(connection: sqlite3.Connection, entity_id: str) -> None:
        for entity in select_entities(connection, "WHERE entity_id = ?", (entity_id,)):
            remove_entity(connection, entity)
            connection.execute("DELETE FROM embedding WHERE row = ?", (entity.row,))
        connection.execute("DELETE FROM tombstone WHERE entity_id = ?", (entity_id,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock:
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    raise Unavailable("others are changing entities for too long; try again") from error
                raise LiveDirError(f"the change could not be written ({error}); see to the disk of LIVE_DIR") from error
            finally:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")


def _open(folder: Path) -> sqlite3.Connection:
    """A connection that writes to the folder's file, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise LiveDirError(
            f"{folder} cannot be used for live changes ({error.strerror}); choose another LIVE_DIR"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two processes that start at once must not both make the file
        return _made(folder)
    finally:
        os.close(descriptor)


def _made(folder: Path) -> sqlite3.Connection:
    path = folder / LIVE_FILE
    connection: sqlite3.Connection | None = None
    try:
        connection = _connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(
                f"BEGIN; {SCHEMA} {INDEXES} {_LIVE_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )
            sync(folder)
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise LiveDirError(f"{path} cannot be used for live changes ({error}); choose another LIVE_DIR") from error
    if version not in (0, _SCHEMA_VERSION):
        connection.close()
        raise LiveDirError(
            f"{path} has schema version {version}, this version of WikiCLIP Serve reads {_SCHEMA_VERSION}; "
            "choose another LIVE_DIR"
        )
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    return connection
