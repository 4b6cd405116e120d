"""In how many pieces an answer is written: it is all there for a client, or for a proxy, or nothing of it is."""

from __future__ import annotations

import asyncio

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.metrics import Metrics
from service.protocol import BoundedHttp

PIECES = [b"one", b"two", b"three"]


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
    if path == "/upload":
        await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"11")]})
    if path == "/fails":
        raise RuntimeError("after the head")
    if path == "/pieces":
        for piece in PIECES:
            await send({"type": "http.response.body", "body": piece, "more_body": piece is not PIECES[-1]})
    else:
        await send({"type": "http.response.body", "body": b"".join(PIECES)})


def written(request: bytes) -> list[bytes]:
    """What is written in answer to a request that says that it is the last of its connection."""

    async def ask() -> list[bytes]:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        protocol = BoundedHttp(config, ServerState(), {}, timeout_s=60.0, refuse=lambda head: None, metrics_of=Metrics)
        transport = Transport()
        protocol.connection_made(transport)
        protocol.data_received(request)
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


def test_nothing_is_told_of_an_answer_that_fails_after_its_head():
    assert written(b"GET /fails HTTP/1.1\r\nHost: a\r\n\r\n") == []
