"""Atomic file writes, hashing, and a clear error for a full disk."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SQLITE_FULL = {"SQLITE_FULL", "SQLITE_IOERR_WRITE"}


def is_uri(source: str | Path) -> bool:
    """Return whether `source` is a URI such as `s3://bucket/prefix` or `file:///folder`, and not a path."""
    return isinstance(source, str) and "://" in source


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. On success, flush the file to disk and rename it to `path`.

    A crash leaves either the old file or the new one. On an error, the temporary file is removed.
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
    """Write `data` to `path`. A crash leaves either the old file or the new one."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Create a folder and lock it. If another process has the lock, wait, or raise `UserError(busy)`."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(str(busy)) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def report_disk_full(out: Path, *, again: str = "run it again") -> Iterator[None]:
    """Raise `UserError` if a write fails because the disk that holds `out` is full. SQLite's errors count too.

    `again` tells the user how to continue: finished work is kept.
    """
    try:
        yield
    except Exception as error:
        # `errno` comes from OSError, `sqlite_errorname` from sqlite3.
        if getattr(error, "errno", None) in _FULL or getattr(error, "sqlite_errorname", None) in _SQLITE_FULL:
            raise UserError(f"the disk of {out} is full; free some space and {again}: finished work is kept") from error
        raise
