"""Slow, silent, endless or malformed clients: their connections are closed in time and other clients are served."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.protocol import GuardedHttpProtocol
from service.server import bind

TIMEOUT_S = 120  # long enough for a busy machine
RECEIVE_MS = 300
HEAD = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def impatient(serve, small_bundle):
    with serve(small_bundle, receive_timeout_ms=RECEIVE_MS) as client:
        yield client


@pytest.fixture
def connection(impatient):
    with socket.create_connection((impatient.base_url.host, impatient.base_url.port), TIMEOUT_S) as connection:
        yield connection


def read_until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def check_refusal(received: bytes, status: int, said: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    assert b"content-security-policy" in head
    assert b"server:" not in head.lower()
    problem = json.loads(body)
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert said in problem["detail"]
    assert problem["request_id"].encode() in head


def trickle(connection: socket.socket, start: bytes, endless: bytes) -> bytes:
    """Send `start`, then `endless` again and again. Return what is received until the connection is closed."""
    connection.sendall(start)
    connection.settimeout(RECEIVE_MS / 1000 / 10)
    received = b""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        try:
            connection.sendall(endless)
            while chunk := connection.recv(65536):
                received += chunk
            return received
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return received
    raise AssertionError("never closed")


def test_a_slow_head_is_a_408(connection):
    check_refusal(trickle(connection, b"GET /livez HTTP/1.1\r\nX: ", b"x"), 408, "head")


def test_a_slow_body_is_a_408(connection):
    check_refusal(trickle(connection, HEAD % 1000, b"x"), 408, "body")


def test_a_silent_connection_is_closed(connection):
    assert read_until_closed(connection) == b""


def test_empty_lines_do_not_keep_a_connection_open(connection):
    assert trickle(connection, b"", b"\r\n")[:12] in (b"HTTP/1.1 408", b"")


def test_a_body_that_continues_after_its_response_is_cut_off(connection):
    received = trickle(connection, b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n", b"x")
    assert received.startswith(b"HTTP/1.1 404")


def test_the_time_of_a_second_head_starts_with_its_first_byte(connection):
    for _ in range(3):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        time.sleep(0.7 * RECEIVE_MS / 1000)  # less than uvicorn's keep-alive timeout, more than a head's time in all
    check_refusal(trickle(connection, b"GET /livez HTTP/1.1\r\nX: ", b"x"), 408, "head")


def test_an_endless_head_is_a_431(connection):
    connection.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"x" * 60_000)
    received = trickle(connection, b"", b"x" * 1000)
    check_refusal(received, 431, "65536")


def test_a_refusal_arrives_while_the_client_still_sends(connection):
    connection.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"x" * 8_000_000)
    check_refusal(read_until_closed(connection), 431, "65536")  # no reset


def test_a_malformed_body_gets_no_second_response(connection):
    connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    received = b""
    while not received.endswith(b"}"):
        received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 404")
    connection.sendall(b"x\r\n")
    assert read_until_closed(connection) == b""


def test_malformed_http_is_a_400(connection):
    connection.sendall(b"\x16\x03\x01\x02\0\x01\0\r\n\r\n")
    check_refusal(read_until_closed(connection), 400, "HTTP")


def test_a_body_declared_too_large_is_a_413_at_once(impatient):
    with socket.create_connection((impatient.base_url.host, impatient.base_url.port), TIMEOUT_S) as connection:
        received = trickle(connection, HEAD % (1 << 40), b"x")
    check_refusal(received, 413, "bytes")


def test_a_body_in_tiny_chunks_is_recognized(connection, giraffe):
    chunks = b"".join(b"2\r\n%b\r\n" % giraffe[start : start + 2] for start in range(0, len(giraffe) - 1, 2))
    last = b"1\r\n%b\r\n" % giraffe[-1:] if len(giraffe) % 2 else b""
    head = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
    connection.sendall(head + b"Connection: close\r\n\r\n" + chunks + last + b"0\r\n\r\n")
    received = read_until_closed(connection)
    assert received.startswith(b"HTTP/1.1 200")
    assert b'"Q15083"' in received


def test_ordinary_clients_are_served(impatient, giraffe):
    for _ in range(3):
        response = impatient.post("/recognize", content=giraffe, headers={"Content-Type": "image/png"})
        assert response.status_code == 200


def test_two_pipelined_requests_get_two_responses(connection):
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
    received = b""
    while received.count(b"HTTP/1.1 200") < 2:
        chunk = connection.recv(65536)
        assert chunk
        received += chunk


def test_accepted_connections_do_not_wait_for_delayed_acks():
    async def has_nodelay() -> bool:
        accepted = asyncio.get_running_loop().create_future()

        def on_connect(reader, writer):
            connection = writer.get_extra_info("socket")
            accepted.set_result(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(on_connect, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            result = await accepted
            writer.close()
            await writer.wait_closed()
        return result

    assert asyncio.run(has_nodelay())


def test_a_reset_connection_leaves_no_timer():
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def timer_after_reset() -> object:
        config = uvicorn.Config(answer, log_config=None, proxy_headers=False)
        config.load()
        lost = asyncio.Event()

        class Protocol(GuardedHttpProtocol):
            def connection_lost(self, exc):
                assert exc is not None
                super().connection_lost(exc)
                lost.set()

        protocol = Protocol(config=config, server_state=ServerState(), app_state={}, timeout_s=TIMEOUT_S)
        server = await asyncio.get_running_loop().create_server(lambda: protocol, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        await lost.wait()
        server.close()
        return protocol.timeout_keep_alive_task

    assert asyncio.run(timer_after_reset()) is None
