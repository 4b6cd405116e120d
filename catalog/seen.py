"""Which entity ids a catalog had so far, on disk: a set of six million of them would take gigabytes of memory."""

from __future__ import annotations

import sqlite3
from types import TracebackType
from typing import Self

_CACHE_KIB = 16 * 1024


class SeenIds:
    """A set of strings in a temporary SQLite file, which SQLite removes by itself, even from a killed process."""

    def __init__(self) -> None:
        # No name: a private file in the system's folder for temporary ones, written only once the cache is full.
        # Made, used and closed by one thread at a time, though not always by the same.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.executescript(
            f"PRAGMA cache_size = -{_CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE seen (entity_id TEXT PRIMARY KEY) WITHOUT ROWID; BEGIN;"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._connection.close()

    def add(self, entity_id: str) -> bool:
        """Whether the id is new."""
        added = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (entity_id,))
        return added.rowcount == 1
