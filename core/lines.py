"""Lines of large compressed files, and JSON Lines: to read, to append durably, and to log records that were skipped."""

import bz2
import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import CatalogError, FeedbackFileError
from core.files import sync

MAX_LINE_BYTES = 16 * 1024**2  # the largest articles and items of Wikimedia's dumps have about 5 MB
LINE_TOO_LONG = f"the line is over {MAX_LINE_BYTES} bytes"
_CHUNK_BYTES = 1 << 18
OnBytes = Callable[[int], object]  # called with the bytes of the file read since the last call


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place after a line: `skip` decompressed bytes into the stream that starts at byte `offset` of the file.

    Files of many compressed streams, as pbzip2 writes them, resume at a stream. `line` is the number of lines before.
    """

    offset: int = 0
    skip: int = 0
    line: int = 0


START = Position()


@dataclass(frozen=True)
class _Piece:
    stream: int  # offset in the file at which the piece's stream starts
    begin: int  # decompressed bytes of the stream before this piece
    data: bytes


def read_lines(
    path: Path, start: Position = START, on_bytes: OnBytes = lambda count: None
) -> Iterator[tuple[bytes, Position]]:
    """Yield each line of a plain, gzip or bzip2 file (detected by content) with the position after it.

    A line over `MAX_LINE_BYTES` is cut somewhere after that many.

    Raises `CatalogError` if the file is missing, damaged or truncated.
    """
    line, partial = start.line, b""
    piece = _Piece(start.offset, start.skip, b"")
    try:
        with path.open("rb") as file:
            for piece in _pieces(file, start.offset, on_bytes):
                begin = max(start.skip - piece.begin, 0) if piece.stream == start.offset else 0
                while (end := piece.data.find(b"\n", begin)) >= 0:
                    line += 1
                    position = Position(offset=piece.stream, skip=piece.begin + end + 1, line=line)
                    yield partial + piece.data[begin : end + 1], position
                    partial, begin = b"", end + 1
                if len(partial) <= MAX_LINE_BYTES:
                    partial += piece.data[begin:]
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CatalogError(
            f"{path} cannot be read after line {line}: {error}; check it, or download it again"
        ) from error
    if partial:
        yield partial, Position(offset=piece.stream, skip=piece.begin + len(piece.data), line=line + 1)


def _pieces(file: BinaryIO, offset: int, on_bytes: OnBytes) -> Iterator[_Piece]:
    magic = file.read(3)
    file.seek(offset)
    if magic == b"BZh":
        yield from _decompressed(file, bz2.BZ2Decompressor, offset, on_bytes)
    elif magic[:2] == b"\x1f\x8b":
        yield from _decompressed(file, lambda: zlib.decompressobj(wbits=31), offset, on_bytes)
    else:
        while data := file.read(_CHUNK_BYTES):
            on_bytes(len(data))
            yield _Piece(offset, 0, data)
            offset += len(data)


def _decompressed(
    file: BinaryIO, new_decompressor: Callable[[], Any], stream: int, on_bytes: OnBytes
) -> Iterator[_Piece]:
    decompressor, produced, pending = new_decompressor(), 0, b""
    while pending or (pending := file.read(_CHUNK_BYTES)):
        if decompressor.eof:
            decompressor, produced = new_decompressor(), 0
            stream = file.tell() - len(pending)
        data = decompressor.decompress(pending, _CHUNK_BYTES)
        while data:
            yield _Piece(stream, produced, data)
            produced += len(data)
            rest = getattr(decompressor, "unconsumed_tail", b"")  # bzip2's keeps it to itself
            data = b"" if decompressor.eof else decompressor.decompress(rest, _CHUNK_BYTES)
        on_bytes(len(pending) - len(decompressor.unused_data))
        pending = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError("the file is truncated")


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A skipped record: its 1-based line number, the reason, and its first 500 characters."""

    line: int
    reason: str
    record: str


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Yield `(line_number, object)` for each line of a file, which may be compressed. Skip blank lines.

    Yields `Rejected` for a line that is not a JSON object, nests too deeply or is over `MAX_LINE_BYTES`. Raises
    `CatalogError` as `read_lines` does.
    """
    for raw, position in read_lines(path):
        if len(raw) > MAX_LINE_BYTES:
            yield Rejected(line=position.line, reason=LINE_TOO_LONG, record=excerpt(raw))
        elif raw.strip():
            yield _parse(position.line, raw)


def _parse(line_number: int, raw: bytes) -> tuple[int, dict[str, Any]] | Rejected:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Rejected(line=line_number, reason=f"not JSON: {error}", record=excerpt(raw))
    if not isinstance(value, dict):
        return Rejected(
            line=line_number, reason=f"expected a JSON object, got {type(value).__name__}", record=excerpt(raw)
        )
    return line_number, value


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON Lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def excerpt(record: object) -> str:
    """Return the beginning of a record, for `Rejected.record`: of a line as it is, of a parsed one as JSON."""
    if isinstance(record, bytes):
        return record[:2000].decode("utf-8", "replace").strip()[:500]
    try:
        return json.dumps(record, default=str)[:500]
    except RecursionError:
        return "(nested too deeply to be shown)"


class RejectLog:
    """Count rejected records and write them to a JSONL file, which is created at the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        path.unlink(missing_ok=True)

    def add(self, rejected: Rejected) -> None:
        self.count += 1
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # for lone surrogates
            file.write(json.dumps(asdict(rejected), ensure_ascii=False) + "\n")


def rejects_path(out: Path) -> Path:
    """Return the path of the reject log next to an output."""
    return out.resolve().parent / "rejected.jsonl"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of feedback. It is on disk when this returns. Processes may share the file.

    Raises `FeedbackFileError` if it cannot be written. Then nothing of the row is left.
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
