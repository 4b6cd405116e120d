"""A file of labelled queries: the embeddings of images with the entities that users say they show. No images."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import FeedbackFileError
from core.files import sync


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line of JSON, which is on disk when this returns. Processes may share the file.

    Raise `FeedbackFileError` if it cannot be written. Then nothing of the row is left.
    """
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            size_bytes = os.fstat(descriptor).st_size
            if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
                line = b"\n" + line  # after a line that a crash cut off
            _write(descriptor, line, size_bytes)
        finally:
            os.close(descriptor)
        if size_bytes == 0:
            sync(path.parent)
    except OSError as error:
        raise FeedbackFileError(
            f"the feedback cannot be written ({error.strerror}) and was not kept; check FEEDBACK_FILE and its disk"
        ) from error


def _write(descriptor: int, line: bytes, size_bytes: int) -> None:
    try:
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size_bytes)
        raise
