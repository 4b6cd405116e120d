"""Extreme HTTP clients. Each opens a connection and returns all that the service sent until it closed it."""

import re
import select
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain, repeat

TIMEOUT_S = 60
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_GET = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\n"
CHUNKED = POST % b"image/png" + b"Transfer-Encoding: chunked\r\n\r\n"


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def send(host: str, port: int, pieces: Iterable[bytes], *, pause_s: float = 0) -> bytes:
    """Send pieces until the service closes the connection, with a pause also until it responds. Then read."""
    received = bytearray()
    with socket.create_connection((host, port), TIMEOUT_S) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
                if pause_s and select.select([connection], [], [], pause_s)[0]:
                    break
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    return bytes(received)


def posted(content_type: bytes, body: bytes) -> list[bytes]:
    """Return a request to recognise `body`, in pieces to send."""
    return [POST % content_type + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body]


_EMPTY_PART = b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n\r\n"
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(GET)
CASES: dict[str, Callable[[], Iterable[bytes]]] = {  # what each sends
    "unread": lambda: repeat(GET * 8000, 400),  # 100 MB, before any response is read
    "pipelined": lambda: [GET * 999 + LAST_GET],
    "large_second_head": lambda: [GET + b"GET /livez HTTP/1.1\r\nX: " + b"x" * 200_000],
    "many_headers": lambda: [b"GET /livez HTTP/1.1\r\n" + b"a:b\r\n" * 10_000 + b"\r\n"],
    "slow_chunks": lambda: chain([CHUNKED], repeat(b"1\r\nx\r\n")),
    "endless_chunk_extension": lambda: chain([CHUNKED + b"1;"], repeat(b"x" * 65536)),
    "endless_trailer": lambda: chain([CHUNKED + b"1\r\nx\r\n0\r\nX: "], repeat(b"x" * 65536)),
    # The body looks like a request, and a request follows.
    "upgrade_with_body": lambda: [POST % b"image/png" + _UPGRADE + GET + LAST_GET],
    "multipart_parts": lambda: posted(b"multipart/form-data; boundary=b", _EMPTY_PART * 400_000 + b"--b--\r\n"),
    "wide_json": lambda: posted(b"application/json", b"[" + b"[]," * 6_900_000 + b"0]"),
}


def connect(name: str, host: str, port: int) -> bytes:
    """Send a case."""
    return send(host, port, CASES[name](), pause_s=0.05 if name == "slow_chunks" else 0)
