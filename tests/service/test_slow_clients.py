"""Clients that are slow, say too much or nothing: each is answered or let go in time, and the next is served."""

from __future__ import annotations

import json
import socket
import time

import pytest

TIMEOUT_S = 120  # generous: a busy machine is no failure
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


def told_until_closed(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def check_refusal(received: bytes, status: int, said: str) -> None:
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    assert b"server:" not in head.lower()
    problem = json.loads(body)
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert problem["status"] == status
    assert said in problem["detail"]
    assert problem["request_id"].encode() in head


def trickle(connection: socket.socket, start: bytes, endless: bytes) -> bytes:
    """Send the start and then a byte at a time, never a whole request; what is told until the connection is closed."""
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


def test_a_head_that_trickles_in_is_a_408(connection):
    check_refusal(trickle(connection, b"GET /livez HTTP/1.1\r\nX: ", b"x"), 408, "head")


def test_a_body_that_trickles_in_is_a_408(connection):
    check_refusal(trickle(connection, HEAD % 1000, b"x"), 408, "body")


def test_who_says_nothing_is_let_go(connection):
    assert told_until_closed(connection) == b""


def test_empty_lines_keep_nothing_open(connection):
    assert trickle(connection, b"", b"\r\n")[:12] in (b"HTTP/1.1 408", b"")


def test_a_body_that_goes_on_after_its_answer_is_cut_off(connection):
    received = trickle(connection, b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n", b"x")
    assert received.startswith(b"HTTP/1.1 404")


def test_a_second_request_has_its_time_from_its_first_byte(connection):
    for _ in range(3):
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        received = b""
        while not received.endswith(b"}"):
            received += connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200")
        time.sleep(0.7 * RECEIVE_MS / 1000)  # idle, within uvicorn's keep-alive, past the first one's time in all
    check_refusal(trickle(connection, b"GET /livez HTTP/1.1\r\nX: ", b"x"), 408, "head")


def test_a_head_without_end_is_a_431(connection):
    connection.sendall(b"GET /livez HTTP/1.1\r\nX: " + b"x" * 60_000)
    received = trickle(connection, b"", b"x" * 1000)
    check_refusal(received, 431, "65536")


def test_what_is_no_http_is_a_400(connection):
    connection.sendall(b"\x16\x03\x01\x02\0\x01\0\r\n\r\n")
    check_refusal(told_until_closed(connection), 400, "no HTTP")


def test_a_body_that_says_it_is_too_large_is_not_waited_for(impatient):
    with socket.create_connection((impatient.base_url.host, impatient.base_url.port), TIMEOUT_S) as connection:
        received = trickle(connection, HEAD % (1 << 40), b"x")
    check_refusal(received, 413, "bytes")


def test_the_patient_are_served_all_the_same(impatient, giraffe):
    for _ in range(3):
        answer = impatient.post("/recognize", content=giraffe, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200


def test_a_pipelined_pair_is_answered_twice(connection):
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 2)
    received = b""
    while received.count(b"HTTP/1.1 200") < 2:
        chunk = connection.recv(65536)
        assert chunk
        received += chunk
