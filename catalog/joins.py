"""The work file of `wikiclip catalog`: an SQLite database that joins the dumps' rows.

A dump's rows and the position in the dump are committed together, so that an interrupted build can resume. Everything
that grows with the dumps is on disk. Items are numbers: 42 is Q42.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.dumps import Item, Page
from core.errors import UserError
from core.lines import START, Position, Rejected, excerpt

_SCHEMA = """
CREATE TABLE settings (value TEXT NOT NULL);
CREATE TABLE progress (source TEXT PRIMARY KEY, "offset" INTEGER, skip INTEGER, line INTEGER, done INTEGER);
CREATE TABLE left_out (reason TEXT PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE rejected (source TEXT, line INTEGER, reason TEXT, record TEXT);
CREATE TABLE pages (
    position INTEGER PRIMARY KEY, item INTEGER UNIQUE, wiki TEXT, page_id INTEGER, title TEXT, url TEXT, text BLOB
);
CREATE UNIQUE INDEX page_ids ON pages (wiki, page_id);
CREATE TABLE page_images (item INTEGER, free INTEGER, file TEXT, PRIMARY KEY (item, free)) WITHOUT ROWID;
CREATE TABLE items (item INTEGER PRIMARY KEY, image TEXT, labels TEXT, description TEXT);
CREATE TABLE types (item INTEGER, place INTEGER, type INTEGER, PRIMARY KEY (item, place)) WITHOUT ROWID;
CREATE TABLE class_labels (item INTEGER PRIMARY KEY, label TEXT);
CREATE TABLE superclasses (class INTEGER, superclass INTEGER, PRIMARY KEY (superclass, class)) WITHOUT ROWID;
CREATE TABLE base (position INTEGER PRIMARY KEY, entity_id TEXT UNIQUE, digest BLOB, record BLOB);
"""
_LOCK = """
PRAGMA locking_mode = EXCLUSIVE;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA cache_size = -65536; -- KiB; items are accessed in random order
BEGIN IMMEDIATE;
"""


@dataclass(frozen=True, kw_only=True)
class JoinedPage(Page):
    """A page with its images, its item and its base record. Images are file names of the page's wiki or of Commons."""

    free_image: str | None
    other_image: str | None
    item_image: str | None
    labels: Mapping[str, str]
    description: str | None
    types: tuple[str, ...]
    base: Mapping[str, Any] | None  # the fields stored by `add_base`
    base_digest: bytes | None


@contextmanager
def open_work(path: Path, lock: str) -> Iterator[sqlite3.Connection]:
    """Open a work file and run a script that locks it. Raises `UserError` if another process has the lock."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as db:  # transactions are explicit
        try:
            db.executescript(lock)
        except sqlite3.OperationalError:
            raise UserError(f"another process is working on {path}; wait for it to end") from None
        yield db


@contextmanager
def open_joins(path: Path, settings: Mapping[str, Any]) -> Iterator[Joins]:
    """Open and lock the work file, which is created if missing and deleted after success.

    Raises `UserError` if another process has the lock, or if the file was begun with other `settings`.
    """
    with open_work(path, _LOCK) as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute("INSERT INTO settings VALUES (?)", (json.dumps(settings),))
        begun = json.loads(db.execute("SELECT value FROM settings").fetchone()[0])
        if differing := [name for name, value in settings.items() if begun.get(name) != value]:
            raise UserError(
                f"{path} was begun with another {', '.join(differing)}; resume with the same, or remove that file"
            )
        yield Joins(db)
    path.unlink()


class Joins:
    """The rows of the dumps. A resumed build reads again what is not committed."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def progress(self, source: str) -> tuple[Position, bool]:
        """Return the position reached in a source, and whether it was read to its end."""
        row = self._db.execute('SELECT "offset", skip, line, done FROM progress WHERE source = ?', (source,)).fetchone()
        if row is None:
            return START, False
        offset, skip, line, done = row
        return Position(offset=offset, skip=skip, line=line), bool(done)

    def set_progress(self, source: str, position: Position, *, done: bool = False) -> None:
        """Record the position reached in a source, and commit."""
        row = (source, position.offset, position.skip, position.line, done)
        self._db.execute("INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)", row)
        self._db.execute("COMMIT")
        self._db.execute("BEGIN IMMEDIATE")

    def leave_out(self, reason: str) -> None:
        """Count a document that was left out."""
        self._db.execute(
            "INSERT INTO left_out VALUES (?, 1) ON CONFLICT (reason) DO UPDATE SET count = count + 1", (reason,)
        )

    def left_out(self) -> dict[str, int]:
        """Return the reasons with their counts, the most frequent first."""
        return dict(self._db.execute("SELECT reason, count FROM left_out ORDER BY count DESC, reason").fetchall())

    def reject(self, source: str, line: int, reason: str, record: bytes) -> None:
        """Record a bad record, with its first 500 characters."""
        self._db.execute("INSERT INTO rejected VALUES (?, ?, ?, ?)", (source, line, reason, excerpt(record)))

    def rejected(self) -> Iterator[tuple[str, Rejected]]:
        """Yield each bad record with its source."""
        for source, line, reason, record in self._db.execute("SELECT * FROM rejected ORDER BY rowid"):
            yield source, Rejected(line=line, reason=f"{source}: {reason}", record=record)

    def add_page(self, page: Page) -> bool:
        """Add a page. Returns False if there is already a page with its id or its item."""
        text = zlib.compress(page.text.encode("utf-8", "replace"), 1)
        row = (page.item, page.wiki, page.page_id, page.title, page.url, text)
        return self._db.execute("INSERT OR IGNORE INTO pages VALUES (NULL, ?, ?, ?, ?, ?, ?)", row).rowcount == 1

    def add_page_images(self, wiki: str, images: Iterable[tuple[int, bool, str]]) -> None:
        """Add the images of known pages, as `read_page_images` yields them."""
        self._db.executemany(
            "INSERT OR REPLACE INTO page_images SELECT item, ?2, ?3 FROM pages WHERE wiki = ?4 AND page_id = ?1",
            ((*image, wiki) for image in images),
        )

    def has_item(self, item: int) -> bool:
        """Return whether there is a page about the item."""
        return self._db.execute("SELECT 1 FROM pages WHERE item = ?", (item,)).fetchone() is not None

    def add_item(self, item: Item) -> None:
        """Add a page's item with its types: what it is an instance of, and its superclasses."""
        row = (item.number, item.image, json.dumps(dict(item.labels), ensure_ascii=False), item.description)
        self._db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?)", row)
        types = ((item.number, place, type_) for place, type_ in enumerate((*item.types, *item.superclasses)))
        self._db.executemany("INSERT OR REPLACE INTO types VALUES (?, ?, ?)", types)

    def add_class(self, item: Item, label: str | None) -> None:
        """Add an item's label and superclasses."""
        if label is not None:
            self._db.execute("INSERT OR REPLACE INTO class_labels VALUES (?, ?)", (item.number, label))
        superclasses = ((item.number, superclass) for superclass in item.superclasses)
        self._db.executemany("INSERT OR IGNORE INTO superclasses VALUES (?, ?)", superclasses)

    def add_base(self, entity_id: str, digest: bytes, record: Mapping[str, Any]) -> None:
        """Add a record of the base catalog, in the base's order."""
        packed = zlib.compress(json.dumps(record, ensure_ascii=False).encode(), 1)
        self._db.execute("INSERT INTO base VALUES (NULL, ?, ?, ?)", (entity_id, digest, packed))

    def count(self, table: str) -> int:
        """Return the number of rows of `pages` or `base`."""
        (count,) = self._db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
        return int(count)

    def create_class_table(self, name: str, roots: Iterable[int]) -> None:
        """Create a temporary table of some items and all their direct and indirect subclasses, for `has_type_in`."""
        self._db.execute(f"CREATE TEMP TABLE {name} (class INTEGER PRIMARY KEY)")
        for root in roots:
            self._db.execute(
                f"""INSERT OR IGNORE INTO {name}
                WITH RECURSIVE below (class) AS (
                    VALUES (?) UNION SELECT superclasses.class FROM superclasses JOIN below ON superclass = below.class
                ) SELECT class FROM below""",
                (root,),
            )

    def name_types(self) -> None:
        """Create a temporary table of the pages' types and all their superclasses with unique names, for `joined`.

        A type's name is its label, with its item if another type has the same label, or its item if it has no label.
        """
        self._db.execute("CREATE INDEX IF NOT EXISTS superclasses_by_class ON superclasses (class, superclass)")
        self._db.execute("CREATE TEMP TABLE type_names (type INTEGER PRIMARY KEY, name TEXT NOT NULL)")
        self._db.execute(
            """INSERT INTO type_names
            WITH RECURSIVE above (type) AS (
                SELECT type FROM types UNION SELECT superclass FROM superclasses JOIN above ON class = above.type
            )
            SELECT type, CASE
                WHEN label IS NULL THEN 'Q' || type
                WHEN COUNT(*) OVER (PARTITION BY label) > 1 THEN label || ' (Q' || type || ')'
                ELSE label
            END FROM above LEFT JOIN class_labels ON item = type"""
        )

    def type_parents(self) -> Iterator[dict[str, Any]]:
        """Yield each type of `name_types` as `wikiclip export --type-parents` reads it."""
        for type_, name in self._db.execute("SELECT type, name FROM type_names ORDER BY type"):
            parents = self._db.execute("SELECT superclass FROM superclasses WHERE class = ? ORDER BY 1", (type_,))
            yield {"type": f"Q{type_}", "label": name, "parents": [f"Q{parent}" for (parent,) in parents]}

    def has_type_in(self, name: str, item: int) -> bool:
        """Return whether a type of the item is in a table made by `create_class_table`."""
        query = f"SELECT 1 FROM types JOIN {name} ON class = type WHERE item = ? LIMIT 1"
        return self._db.execute(query, (item,)).fetchone() is not None

    def joined(self) -> Iterator[JoinedPage]:
        """Yield every page: those of the base in its order, then the others in the order of the dumps.

        Needs `name_types`.
        """
        yield from self._join(
            "base CROSS JOIN pages ON pages.item = CAST(substr(entity_id, 2) AS INTEGER) AND entity_id = 'Q' || "
            "pages.item {} ORDER BY base.position"
        )
        yield from self._join(
            "pages LEFT JOIN base ON entity_id = 'Q' || pages.item {} WHERE entity_id IS NULL ORDER BY pages.position"
        )

    def _join(self, pages: str) -> Iterator[JoinedPage]:
        query = (
            "SELECT pages.item, wiki, page_id, title, url, text, digest AS base_digest, record AS base, labels, "
            "description, image AS item_image, free.file AS free_image, other.file AS other_image FROM "
        ) + pages.format(
            "LEFT JOIN items ON items.item = pages.item "
            "LEFT JOIN page_images AS free ON free.item = pages.item AND free.free = 1 "
            "LEFT JOIN page_images AS other ON other.item = pages.item AND other.free = 0"
        )
        cursor = self._db.cursor()
        cursor.row_factory = sqlite3.Row
        for row in cursor.execute(query):
            types = self._db.execute(
                "SELECT name FROM types JOIN type_names USING (type) WHERE item = ? ORDER BY place", (row["item"],)
            )
            parsed = {
                "text": zlib.decompress(row["text"]).decode(),
                "labels": json.loads(row["labels"] or "{}"),
                "types": tuple(dict.fromkeys(name for (name,) in types)),
                "base": None if row["base"] is None else json.loads(zlib.decompress(row["base"])),
            }
            yield JoinedPage(**{**dict(row), **parsed})
