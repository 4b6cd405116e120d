"""Live changes on disk: a SQLite file in LIVE_DIR with the entities that were put and deleted while serving.

Every change has a revision number. An entity that was put has the revision as its row. A change is durable when the
call that makes it returns (WAL, `synchronous = FULL`). Processes of one host share the folder: writes take turns, and
`refresh` reads the changes of the others.

Table `base` lists the bundles that the changes apply to. Each bundle already contains the changes up to its
`from_generation`. `wikiclip index --compact` adds the bundle that it makes, so that services of the old and the new one
can share the folder. Rows that only the old bundle needs are deleted at the next compaction.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from core.arrays import Float32Array, normalised
from core.errors import LiveDirError, Unavailable, UnknownEntity
from core.files import locked, sync
from index.bundle import Bundle
from index.delta import Delta
from index.manifest import content_fingerprint
from index.store import (
    INDEXES,
    SCHEMA,
    EntityStore,
    StoredEntity,
    insert_entity,
    remove_entity,
    select_entities,
    unknown_entity,
)

LIVE_FILE = "live.sqlite"
_SCHEMA_VERSION = 1
_BUSY_S = 5.0  # a change takes milliseconds
_LIVE_SCHEMA = """
CREATE TABLE live (generation INTEGER NOT NULL);
INSERT INTO live VALUES (0);
CREATE TABLE base (content TEXT PRIMARY KEY, name TEXT NOT NULL, from_generation INTEGER NOT NULL);
CREATE TABLE embedding (row INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE tombstone (generation INTEGER PRIMARY KEY, entity_id TEXT NOT NULL UNIQUE);
"""


class LiveSegment:
    """The live changes to one bundle. `delta` has those of the last `refresh`. Thread-safe.

    Raise `LiveDirError` if the folder cannot be used or has changes to another bundle.
    """

    poll_interval_s = 0.1

    def __init__(self, folder: Path, bundle: Bundle, base: EntityStore) -> None:
        self._content = content_fingerprint(bundle.manifest)
        self._name = bundle.name
        self._base = base
        self._base_count = len(base)
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer = _open(folder)
        self._path = path = folder / LIVE_FILE
        self._file = path.stat()
        self._reader = _connect(path)
        self.store = EntityStore(path, immutable=False)
        self._seen_version: int | None = None
        try:
            self.base_revision = self._read_base_revision(self._reader)
            compacted = "SELECT count(*) FROM entity WHERE row <= ?"
            (self.compacted_count,) = self._reader.execute(compacted, (self.base_revision,)).fetchone()
            self.delta = Delta.empty(bundle.manifest.embedding_dim, self.base_revision)
            self.refresh()
        except LiveDirError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. No thread may be using it."""
        self.store.close()
        self._reader.close()
        self._writer.close()

    def refresh(self) -> Delta:
        """Read the changes of all processes. Cheap if there are none.

        Raise `LiveDirError` if the changes no longer belong to this bundle, or their file has disappeared.
        """
        self._check_file()
        with self._read_lock:
            (version,) = self._reader.execute("PRAGMA data_version").fetchone()
            if version != self._seen_version:
                self._read_changes()
                self._seen_version = version
            return self.delta

    def put(self, entity: StoredEntity, embedding_D: Float32Array, thumbnail: bytes | None) -> bool:
        """Add or replace an entity, and return whether it is new. Its `row` is ignored.

        The embedding is finite and not zero. Raise `Unavailable` if other writers take too long, `LiveDirError`.
        """
        vector_D = normalised(embedding_D[None])[0].astype("<f2")
        with self._transaction() as connection:
            created = not self._exists(entity.entity_id)
            row = self._next_revision(connection)
            self._forget(connection, entity.entity_id)
            insert_entity(connection, replace(entity, row=row), thumbnail)
            connection.execute("INSERT INTO embedding VALUES (?, ?)", (row, vector_D.tobytes()))
        self.refresh()
        return created

    def delete(self, entity_id: str) -> None:
        """Delete an entity. Raise `UnknownEntity` if there is none, otherwise as `put` does."""
        with self._transaction() as connection:
            if not self._exists(entity_id):
                raise unknown_entity(entity_id)
            revision = self._next_revision(connection)
            self._forget(connection, entity_id)
            connection.execute("INSERT INTO tombstone VALUES (?, ?)", (revision, entity_id))
        self.refresh()

    def rebase(self, content: str, name: str, revision: int) -> None:
        """Record that a bundle (content fingerprint and name) contains the changes up to `revision`.

        Delete what only bundles older than this one needed. Raise as `put` does.
        """
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO base VALUES (?, ?, ?)", (content, name, revision))
            connection.execute("DELETE FROM base WHERE from_generation < ?", (self.base_revision,))
            (needed_after,) = connection.execute("SELECT min(from_generation) FROM base").fetchone()
            for entity in select_entities(connection, "WHERE row <= ?", (needed_after,)):
                self._forget(connection, entity.entity_id)
            connection.execute("DELETE FROM tombstone WHERE generation <= ?", (needed_after,))

    def thumbnail(self, row: int) -> bytes | None:
        """Return the WebP thumbnail of an entity that was put, by its row in a delta, if it still has one."""
        revision = row - self._base_count
        return self.store.thumbnails([revision]).get(revision)

    def _read_changes(self) -> None:
        last = (self.delta.revision,)
        with self._reader:
            self._reader.execute("BEGIN")  # one snapshot for all statements
            self._read_base_revision(self._reader)
            (revision,) = self._reader.execute("SELECT generation FROM live").fetchone()
            put = select_entities(self._reader, "WHERE row > ? ORDER BY row", last)
            vectors = dict(self._reader.execute("SELECT row, vector FROM embedding WHERE row > ?", last).fetchall())
            tombstones = self._reader.execute("SELECT entity_id FROM tombstone WHERE generation > ?", last)
            deleted = [entity_id for (entity_id,) in tombstones]
        # The file has each entity once: what was put last, or a tombstone.
        base_rows = map(self._base_row, [*(entity.entity_id for entity in put), *deleted])
        self.delta = self.delta.changed(
            revision,
            [
                (
                    replace(entity, row=self._base_count + entity.row),
                    normalised(np.frombuffer(vectors[entity.row], "<f2")[None])[0],
                )
                for entity in put
            ],
            deleted,
            hidden=[row for row in base_rows if row is not None],
        )

    def _read_base_revision(self, connection: sqlite3.Connection) -> int:
        """Return up to which revision this bundle contains the changes."""
        bases = connection.execute("SELECT content, name, from_generation FROM base").fetchall()
        mine = [int(row["from_generation"]) for row in bases if row["content"] == self._content]
        if bases and not mine:
            raise LiveDirError(
                f"the live changes belong to bundle {bases[-1]['name']!r}, not to the one being served; serve that "
                "one, fold them into it with `wikiclip index --compact`, or choose another LIVE_DIR"
            )
        return mine[0] if mine else 0

    def _base_row(self, entity_id: str) -> int | None:
        try:
            return self._base.get(entity_id).row
        except UnknownEntity:
            return None

    def _exists(self, entity_id: str) -> bool:
        """Return whether an entity exists. In a transaction, no other process can change that."""
        latest = self.refresh().latest
        return (latest[entity_id] if entity_id in latest else self._base_row(entity_id)) is not None

    def _next_revision(self, connection: sqlite3.Connection) -> int:
        self._read_base_revision(connection)
        if connection.execute("SELECT 1 FROM base").fetchone() is None:  # the first change of all
            connection.execute("INSERT INTO base VALUES (?, ?, 0)", (self._content, self._name))
        connection.execute("UPDATE live SET generation = generation + 1")
        (revision,) = connection.execute("SELECT generation FROM live").fetchone()
        return int(revision)

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
                with self._writer:
                    self._writer.execute("BEGIN IMMEDIATE")
                    yield self._writer
            except sqlite3.Error as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                    raise Unavailable("other processes have been changing entities for too long; try again") from error
                raise LiveDirError(f"the change could not be written ({error}); check LIVE_DIR's disk") from error

    def _check_file(self) -> None:
        """Raise `LiveDirError` if the open file is not the one in LIVE_DIR: what is written to it would be lost."""
        try:
            same = os.path.samestat(self._path.stat(), self._file)
        except OSError as error:
            raise LiveDirError(
                f"the file in LIVE_DIR has disappeared ({error.strerror}); move it back, or restart the service"
            ) from error
        if not same:
            raise LiveDirError("the file in LIVE_DIR was replaced while it was open; restart the service")


def _open(folder: Path) -> sqlite3.Connection:
    """Return a connection for writing. Create the folder and its file if they are missing."""
    path = folder / LIVE_FILE
    try:
        with locked(folder):  # processes that start together must not both create the file
            version = _create(path)
    except (OSError, sqlite3.Error) as error:
        raise LiveDirError(f"{path} cannot be used for live changes ({error}); choose another LIVE_DIR") from error
    if version != _SCHEMA_VERSION:
        raise LiveDirError(
            f"{path} has schema version {version}, this version of WikiCLIP Serve reads {_SCHEMA_VERSION}; "
            "choose another LIVE_DIR"
        )
    return _connect(path)


def _create(path: Path) -> int:
    """Create the file if it is missing, and return its schema version."""
    with closing(_connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != 0:
            return int(version)
        connection.executescript(
            f"BEGIN; {SCHEMA} {INDEXES} {_LIVE_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
        )
    sync(path.parent)
    return _SCHEMA_VERSION


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    return connection
