"""Extreme HTTP clients. Each function opens a connection and returns all that the service sent until it closed it."""

from __future__ import annotations

import re
import select
import socket
from collections.abc import Iterable
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


def unread(host: str, port: int) -> bytes:
    """Send 100 MB of requests and read no response before all are sent, or the connection is closed."""
    return send(host, port, repeat(GET * 8000, 400))


def pipelined(host: str, port: int) -> bytes:
    return send(host, port, [GET * 999 + LAST_GET])


def large_second_head(host: str, port: int) -> bytes:
    return send(host, port, [GET + b"GET /livez HTTP/1.1\r\nX: " + b"x" * 200_000])


def many_headers(host: str, port: int) -> bytes:
    return send(host, port, [b"GET /livez HTTP/1.1\r\n" + b"a:b\r\n" * 10_000 + b"\r\n"])


def slow_chunks(host: str, port: int) -> bytes:
    return send(host, port, chain([CHUNKED], repeat(b"1\r\nx\r\n")), pause_s=0.05)


def endless_chunk_extension(host: str, port: int) -> bytes:
    return send(host, port, chain([CHUNKED + b"1;"], repeat(b"x" * 65536)))


def endless_trailer(host: str, port: int) -> bytes:
    return send(host, port, chain([CHUNKED + b"1\r\nx\r\n0\r\nX: "], repeat(b"x" * 65536)))


def upgrade_with_body(host: str, port: int) -> bytes:
    """Ask for HTTP/2 with a body that looks like a request, then send a request."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(GET)
    return send(host, port, [POST % b"image/png" + upgrade + GET + LAST_GET])


def multipart_parts(host: str, port: int) -> bytes:
    part = b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n\r\n"
    return post(host, port, b"multipart/form-data; boundary=b", part * 400_000 + b"--b--\r\n")


def wide_json(host: str, port: int) -> bytes:
    return post(host, port, b"application/json", b"[" + b"[]," * 6_900_000 + b"0]")


def post(host: str, port: int, content_type: bytes, body: bytes) -> bytes:
    head = POST % content_type + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    return send(host, port, [head, body])
