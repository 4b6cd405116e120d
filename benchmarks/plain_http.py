"""HTTP in as few steps as a load generator can do with: its core is to go into asking, and what a client's library does
with an answer would be counted as the service's time."""

from __future__ import annotations

import socket
import time
from typing import NamedTuple

HEAD_END = b"\r\n\r\n"
_RECEIVE_BYTES = 64 * 1024


class Answered(NamedTuple):
    """The head of an answer, as far as it matters here."""

    status: int
    body_bytes: int
    keeps_open: bool
    says_when: bool  # by a Retry-After


def request_bytes(target: str, content_type: str, body: bytes) -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: a\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}"
    return head.encode() + HEAD_END + body


def read_head(head: bytes) -> Answered:
    """Raises `ValueError` where it is no head of an answer whose length is told."""
    lines = head.lower().split(b"\r\n")
    lengths = [int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:")]
    if len(lengths) != 1:
        raise ValueError("an answer that does not say its length")
    return Answered(
        status=int(lines[0].split(b" ", 2)[1]),
        body_bytes=lengths[0],
        keeps_open=b"connection: close" not in lines,
        says_when=any(line.startswith(b"retry-after:") for line in lines),
    )


class Connection:
    """A connection that is opened when it is needed, and kept.

    One that `polls` never sleeps while it waits: a virtual core that does is woken a tenth of a millisecond late, which
    would be counted as the service's time.
    """

    def __init__(self, host: str, port: int, timeout_s: float, *, polls: bool = False) -> None:
        self._address = host, port
        self._timeout_s = timeout_s
        self._polls = polls
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> int:
        """The status of the answer, once all of it has come. Raises `OSError` or `ValueError`; then it is closed."""
        try:
            answered = self._ask(request)
        except (OSError, ValueError):
            self.close()
            raise
        if not answered.keeps_open:
            self.close()
        return answered.status

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, request: bytes) -> Answered:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(request)
        received = b""
        while HEAD_END not in received:
            received += self._receive()
        head, _, body = received.partition(HEAD_END)
        answered = read_head(head)
        missing = answered.body_bytes - len(body)
        while missing > 0:
            missing -= len(self._receive())
        return answered

    def _receive(self) -> bytes:
        assert self._socket is not None
        received = self._poll(self._socket) if self._polls else self._socket.recv(_RECEIVE_BYTES)
        if not received:
            raise ConnectionResetError("closed before all of the answer had come")
        return received

    def _poll(self, connected: socket.socket) -> bytes:
        until = time.monotonic() + self._timeout_s
        connected.setblocking(False)
        try:
            while time.monotonic() < until:
                try:
                    return connected.recv(_RECEIVE_BYTES)
                except BlockingIOError:
                    continue
        finally:
            connected.settimeout(self._timeout_s)
        raise TimeoutError("no answer in time")
