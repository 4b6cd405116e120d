"""Files that are whole or absent: hashing, and writing through a temporary name."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SQLITE_FULL = {"SQLITE_FULL", "SQLITE_IOERR_WRITE"}


def is_uri(source: str | Path) -> bool:
    """Whether this names a place as `s3://bucket/prefix` or `file:///folder` does, and no path."""
    return isinstance(source, str) and "://" in source


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is flushed to disk and renamed to `path`.

    A crash at any moment leaves either the old file or the new one. The temporary file is removed on an error.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old file or the new one, never a part."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def report_disk_full(out: Path, *, again: str = "run it again") -> Iterator[None]:
    """Raise `UserError` where a file or an SQLite database finds that the disk of `out` takes no more.

    `again` says how the user goes on from what is finished.
    """
    try:
        yield
    except Exception as error:
        # Of an OSError, and of what sqlite3 raises.
        if getattr(error, "errno", None) in _FULL or getattr(error, "sqlite_errorname", None) in _SQLITE_FULL:
            raise UserError(f"the disk of {out} is full; make room and {again}: what is finished stays") from error
        raise
