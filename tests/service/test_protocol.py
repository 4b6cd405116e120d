"""In how many pieces an answer is written: it is all there for a client, or for a proxy, or nothing of it is. And in
how many a body is told to the app."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from hashlib import sha256
from random import Random

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.protocol import BoundedHttp
from service.telemetry import Metrics

PIECES = [b"one", b"two", b"three"]
randbytes = Random(0).randbytes


class Transport(asyncio.Transport):
    """Keeps what is written to it, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = asyncio.Event()

    def write(self, data):
        self.written.append(bytes(data))

    def is_closing(self):
        return self.closed.is_set()

    def close(self):
        self.closed.set()

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass


async def app(scope, receive, send):
    path = scope["path"]
    if path == "/told":
        await tell_body(receive, send)
        return
    if path == "/upload":
        await receive()
    length = b"12" if path == "/quotes" else b"11"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    if path == "/fails":
        raise RuntimeError("after the head")
    if path == "/pieces":
        for piece in PIECES:
            await send({"type": "http.response.body", "body": piece, "more_body": piece is not PIECES[-1]})
    elif path == "/quotes":
        await send({"type": "http.response.body", "body": b"HTTP/1.1 100"})
    else:
        await send({"type": "http.response.body", "body": b"".join(PIECES)})


async def tell_body(receive, send):
    """Answer with the size of each message that the body came in, and its SHA-256."""
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message["body"])
        more = message["more_body"]
    told = json.dumps({"sizes": [len(part) for part in parts], "sha256": sha256(b"".join(parts)).hexdigest()}).encode()
    headers = [(b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


def connected() -> tuple[BoundedHttp, Transport]:
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    protocol = BoundedHttp(config, ServerState(), {}, timeout_s=60.0, refuse=lambda head: None, metrics_of=Metrics)
    transport = Transport()
    protocol.connection_made(transport)
    return protocol, transport


def written(*pieces: bytes, late: bytes = b"") -> list[bytes]:
    """What is written in answer to a request that says that it is the last of its connection. It comes in pieces right
    after each other, and what is `late` when the app has had its turn."""

    async def ask() -> list[bytes]:
        protocol, transport = connected()
        for piece in pieces:
            protocol.data_received(piece)
        if late:
            while not protocol.tasks:  # the app is started
                await asyncio.sleep(0)
            await asyncio.sleep(0)  # and waits for the rest
            protocol.data_received(late)
        await asyncio.wait_for(transport.closed.wait(), 60)
        protocol.connection_lost(None)
        return transport.written

    return asyncio.run(ask())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_answer_is_written_at_once(method):
    (answer,) = written(f"{method} / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert body == b"onetwothree"


def test_a_body_that_looks_like_a_head_comes_after_its_own():
    (answer,) = written(b"GET /quotes HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"\r\n\r\nHTTP/1.1 100")


def test_what_comes_in_pieces_has_its_head_with_the_first():
    first, *others = written(b"GET /pieces HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert first.partition(b"\r\n\r\n")[2] == PIECES[0]
    assert others == PIECES[1:]


def test_a_head_alone():
    (answer,) = written(b"HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"\r\n\r\n")


def test_who_waits_to_send_a_body_is_told_at_once():
    told, answer = written(
        b"POST /upload HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx"
    )
    assert told == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.endswith(b"onetwothree")


def told_of(body: bytes, *pieces: bytes, late: bytes = b"") -> list[int]:
    """The sizes that the app is told a body in, which is sent in these pieces."""
    head = f"POST /told HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    (answer,) = written(head + pieces[0], *pieces[1:], late=late)
    told = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert told["sha256"] == sha256(body).hexdigest()
    return told["sizes"]


def test_a_body_that_is_there_is_told_at_once():
    body = randbytes(300_000)
    assert told_of(body, body) == [300_000]
    assert told_of(body, body[:1000], body[1000:250_000], body[250_000:]) == [300_000]
    assert told_of(body, b"", body) == [300_000]


def test_what_comes_later_is_told_when_all_of_it_is_there():
    body = randbytes(300_000)
    assert told_of(body, body[:1000], late=body[1000:]) == [300_000]


def test_of_a_large_body_the_app_is_told_before_all_of_it_has_come():
    body = randbytes(2_500_000)
    assert told_of(body, body[:1_500_000], late=body[1_500_000:]) == [1_500_000, 1_000_000]


@pytest.mark.parametrize("size_bytes", [1, 2, 4095, 4096, 10_000])
def test_however_small_the_pieces_are_a_body_takes_the_memory_of_its_bytes(size_bytes):
    body = randbytes(600_000)
    head = b"POST /told HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)

    async def receive() -> tuple[int, bytes]:
        protocol, _ = connected()
        tracemalloc.start()
        try:
            protocol.data_received(head + chunks)
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return held_bytes, bytes(protocol.cycle.body)

    held_bytes, received = asyncio.run(receive())
    assert received == body
    assert held_bytes < 1.5 * len(body)


def test_nothing_is_told_of_an_answer_that_fails_after_its_head():
    assert written(b"GET /fails HTTP/1.1\r\nHost: a\r\n\r\n") == []
