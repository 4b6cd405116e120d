"""Live changes on disk: a SQLite file in LIVE_DIR with the entities and images that were added and removed.

Every change has a revision number. An entity that was put has the revision as its row. A change is durable when the
call that makes it returns (WAL, `synchronous = FULL`). Processes of one host share the folder: writes take turns, and
`refresh` reads the changes of the others.

Table `base` lists the bundles that the changes apply to. Each bundle already contains the changes up to its
`from_generation`. `wikiclip index --compact` adds the bundle that it makes, so that services of the old and the new one
can share the folder. Rows that only the old bundle needs are deleted at the next compaction.

Table `reference` has all vectors of each entity that was put or given images: those of a base bundle are copied, so
that the list is complete whichever bundle is served. An image that was removed leaves its row without the vector.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from core.arrays import Float16Array, Float32Array
from core.errors import LiveDirError, Unavailable
from core.files import locked, sync
from index.bundle import Bundle
from index.delta import Delta, References, all_image_ids, check_removable, rounded
from index.embeddings import Embeddings
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
_SCHEMA_VERSION = 2
_BUSY_S = 5.0  # a change takes milliseconds
_LIVE_SCHEMA = """
CREATE TABLE live (generation INTEGER NOT NULL);
INSERT INTO live VALUES (0);
CREATE TABLE base (content TEXT PRIMARY KEY, name TEXT NOT NULL, from_generation INTEGER NOT NULL);
CREATE TABLE tombstone (generation INTEGER PRIMARY KEY, entity_id TEXT NOT NULL UNIQUE);
"""
_CHANGED = "max(generation, coalesce(removed, 0))"
_REFERENCES = f"""
CREATE TABLE reference (
    position INTEGER PRIMARY KEY, entity_id TEXT NOT NULL, image_id TEXT UNIQUE, generation INTEGER NOT NULL,
    removed INTEGER, vector BLOB NOT NULL
);
CREATE INDEX reference_by_entity ON reference (entity_id);
CREATE INDEX reference_by_change ON reference ({_CHANGED});
"""
_FROM_VERSION_1 = f"""
{_REFERENCES}
INSERT INTO reference (entity_id, image_id, generation, vector)
    SELECT entity_id, iif(image_count, printf('%016x', row), NULL), row, vector FROM embedding JOIN entity USING (row)
    ORDER BY row;
DROP TABLE embedding;
"""


class LiveSegment:
    """The live changes to one bundle. `delta` has those of the last `refresh`. Thread-safe.

    Raise `LiveDirError` if the folder cannot be used or has changes to another bundle.
    """

    poll_interval_s = 0.1

    def __init__(self, folder: Path, bundle: Bundle, base: EntityStore) -> None:
        self._content = content_fingerprint(bundle.manifest)
        self._name = bundle.name
        self._bundle = bundle
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
            manifest = bundle.manifest
            self.delta = Delta.empty(manifest.embedding_dim, self.base_revision, manifest.pooling)
            self.refresh()
        except LiveDirError:
            self.close()
            raise

    @property
    def revision(self) -> int:
        return self.delta.revision

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

    def put(
        self,
        entity: StoredEntity,
        embeddings_ID: Float32Array,
        thumbnail: bytes | None,
        image_ids: Sequence[str] = (),
    ) -> bool:
        """Add or replace an entity, and return whether it is new. Its `row` is ignored.

        `embeddings_ID` are those of its images, which get new `image_ids`, or without ids the one embedding [D] of the
        entity. They are finite and not zero. Raise `Unavailable` if other writers take too long, `LiveDirError`.
        """
        vectors_ID = rounded(np.atleast_2d(embeddings_ID))
        with self._transaction() as connection:
            created = self._find(entity.entity_id) is None
            row = self._next_revision(connection)
            self._forget(connection, entity.entity_id)
            insert_entity(connection, replace(entity, row=row), thumbnail)
            for image_id, vector_D in zip(image_ids or (None,), vectors_ID, strict=True):
                _insert_reference(connection, entity.entity_id, image_id, row, vector_D)
        self.refresh()
        return created

    def add_image(self, entity_id: str, image_id: str, embedding_D: Float32Array) -> None:
        """Add an image with a new id to an entity. Its embedding is finite and not zero.

        Raise `UnknownEntity`, otherwise as `put` does.
        """
        with self._transaction() as connection:
            if self._find(entity_id) is None:
                raise unknown_entity(entity_id)
            revision = self._next_revision(connection)
            if connection.execute("SELECT 1 FROM reference WHERE entity_id = ?", (entity_id,)).fetchone() is None:
                images = self._embeddings
                for vector_D in images.stored(images.positions_of(self._base.get(entity_id).row)):
                    _insert_reference(connection, entity_id, None, 0, vector_D)
            _insert_reference(connection, entity_id, image_id, revision, rounded(embedding_D[None])[0])
        self.refresh()

    def remove_image(self, entity_id: str, image_id: str) -> None:
        """Remove an image that was added while serving.

        Raise `UnknownEntity`, `NotFound`, `Conflict` for an image of the bundle and for the only one of an entity
        that was put, otherwise as `put` does.
        """
        with self._transaction() as connection:
            if (entity := self._find(entity_id)) is None:
                raise unknown_entity(entity_id)
            present = "SELECT image_id, generation FROM reference WHERE entity_id = ? AND removed IS NULL"
            images = connection.execute(present, (entity_id,)).fetchall()
            added = [each for each, since in images if each is not None and since > self.base_revision]
            known = [*all_image_ids(entity.image_count, added), *(each for each, _ in images)]
            is_only = entity.row >= self._base_count and len(images) == 1
            check_removable(image_id, known, added, is_only=is_only)
            revision = self._next_revision(connection)
            connection.execute(
                "UPDATE reference SET removed = ?, vector = x'' WHERE image_id = ?", (revision, image_id)
            )
        self.refresh()

    def delete(self, entity_id: str) -> None:
        """Delete an entity. Raise `UnknownEntity` if there is none, otherwise as `put` does."""
        with self._transaction() as connection:
            if self._find(entity_id) is None:
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
                remove_entity(connection, entity)
            unchanged = f"entity_id NOT IN (SELECT entity_id FROM reference WHERE {_CHANGED} > ?)"
            connection.execute(f"DELETE FROM reference WHERE {unchanged}", (needed_after,))
            connection.execute("DELETE FROM reference WHERE removed <= ?", (needed_after,))
            connection.execute("DELETE FROM tombstone WHERE generation <= ?", (needed_after,))

    def thumbnail(self, row: int) -> bytes | None:
        """Return the WebP thumbnail of an entity that was put, by its row in a delta, if it still has one."""
        revision = row - self._base_count
        return self.store.thumbnails([revision]).get(revision)

    def _read_changes(self) -> None:
        last = (self.delta.revision,)
        changed = f"WHERE entity_id IN (SELECT entity_id FROM reference WHERE {_CHANGED} > ?)"
        with self._reader:
            self._reader.execute("BEGIN")  # one snapshot for all statements
            self._read_base_revision(self._reader)
            (revision,) = self._reader.execute("SELECT generation FROM live").fetchone()
            put = select_entities(self._reader, f"{changed} AND row > ?", (*last, self.base_revision))
            found = self._reader.execute(f"SELECT * FROM reference {changed} ORDER BY entity_id, position", last)
            rows_of = {entity_id: list(rows) for entity_id, rows in groupby(found, itemgetter("entity_id"))}
            tombstones = self._reader.execute("SELECT entity_id FROM tombstone WHERE generation > ?", last)
            deleted = [entity_id for (entity_id,) in tombstones]
        # The file has each entity once: what was put last, or a tombstone.
        records = {each.entity_id: replace(each, row=self._base_count + each.row) for each in put}
        restored: list[str] = []
        changes: list[tuple[StoredEntity, References]] = []
        for entity_id, rows in rows_of.items():
            entity = records.get(entity_id)
            if entity is None and self._is_as_in_base(rows):
                restored.append(entity_id)
            else:
                changes.append(self._with_images(entity or self._base.get(entity_id), rows))
        hidden = [each.row for each in self._base.by_ids([*(each.entity_id for each, _ in changes), *deleted]).values()]
        self.delta = self.delta.changed(revision, changes, deleted, hidden, restored)

    def _is_as_in_base(self, rows: Sequence[sqlite3.Row]) -> bool:
        """Return whether the bundle has exactly these images: none was added since, or removed."""
        base = self.base_revision
        return not any(
            row["removed"] is None if row["generation"] > base else (row["removed"] or 0) > base for row in rows
        )

    def _with_images(self, entity: StoredEntity, rows: Sequence[sqlite3.Row]) -> tuple[StoredEntity, References]:
        """Return an entity as it is now, given as it was put or is in the base, and what it is found by."""
        of_base = entity.row < self._base_count
        since = self.base_revision if of_base else entity.row - self._base_count  # `image_count` is of then
        images = [row for row in rows if row["image_id"] is not None]
        removed = sum(row["generation"] <= since < (row["removed"] or 0) for row in images)
        added = sum(row["generation"] > since and row["removed"] is None for row in images)
        vectors = [np.frombuffer(row["vector"], "<f2") for row in rows if row["removed"] is None]
        remembered, entry = self._remembered, self._bundle.manifest.remembered
        references = References(
            images_ID=np.array(vectors, np.float16).reshape(-1, self._bundle.manifest.embedding_dim),
            image_ids=tuple(
                row["image_id"] for row in images if row["removed"] is None and row["generation"] > self.base_revision
            ),
            remembered_RD=remembered.images_of(entity.row) if of_base and remembered is not None else None,
            handicap=0.0 if entry is None else entry.handicap,
        )
        return replace(entity, image_count=entity.image_count - removed + added), references

    @cached_property
    def _embeddings(self) -> Embeddings:
        return self._bundle.embeddings()

    @cached_property
    def _remembered(self) -> Embeddings | None:
        return self._bundle.remembered_vectors()

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

    def _find(self, entity_id: str) -> StoredEntity | None:
        """Return an entity as it is now, if it exists. In a transaction, no other process can change that."""
        delta = self.refresh()
        if entity_id not in delta.latest:
            return self._base.by_ids([entity_id]).get(entity_id)
        row = delta.latest[entity_id]
        return None if row is None else delta.entities[row]

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
        connection.execute("DELETE FROM reference WHERE entity_id = ?", (entity_id,))
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
    """Create the file if it is missing, or bring it to the current schema version. Return its version."""
    with closing(_connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > 1:
            return int(version)
        changes = _FROM_VERSION_1 if version else f"{SCHEMA} {INDEXES} {_LIVE_SCHEMA} {_REFERENCES}"
        connection.executescript(f"BEGIN IMMEDIATE; {changes} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
    sync(path.parent)
    return _SCHEMA_VERSION


def _insert_reference(
    connection: sqlite3.Connection, entity_id: str, image_id: str | None, revision: int, vector_D: Float16Array
) -> None:
    connection.execute(
        "INSERT INTO reference (entity_id, image_id, generation, vector) VALUES (?, ?, ?, ?)",
        (entity_id, image_id, revision, vector_D.astype("<f2").tobytes()),
    )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")
    return connection
