"""Lines of large compressed files. Reading can resume after any line without decompressing from the start."""

import bz2
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import CatalogError

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
