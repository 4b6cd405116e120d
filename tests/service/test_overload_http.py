"""Batching, deadlines, a full queue and disconnecting clients, with an encoder that blocks at a gate."""

from __future__ import annotations

import gc
import re
import socket
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest

from imaging import decoder

TIMEOUT_S = 120  # long enough for a busy machine
DEADLINE_MS = 3000  # long enough for a busy machine to decode an image


@pytest.fixture
def encoder(gated_encoder):
    return gated_encoder


@pytest.fixture
def images(small_images) -> list[bytes]:
    return list(small_images.values())


def ask(service, image: bytes):
    return service.post("/recognize", content=image, headers={"Content-Type": "image/png"})


def until(service, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    over_at = time.monotonic() + TIMEOUT_S
    while time.monotonic() < over_at:
        if f"\n{name} {value}\n" in service.get("/metrics").text:
            return
        time.sleep(0.01)  # the service is in another thread: polling is the only way to see its state
    raise AssertionError(f"{name} never was {value}")


def test_waiting_requests_are_encoded_together(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder, max_batch=32) as service, ThreadPoolExecutor(11) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        others = [pool.submit(ask, service, image) for image in images[1:]]
        until(service, "wikiclip_queue_images", len(images) - 1.0)
        encoder.gate.set()
        assert all(each.result(TIMEOUT_S).status_code == 200 for each in (first, *others))
    assert encoder.sizes == [1, len(images) - 1]


def test_the_batch_limit_on_a_cpu_depends_on_threads(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(11) as pool:
        asked = [pool.submit(ask, service, images[0])]
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        asked += [pool.submit(ask, service, image) for image in images[1:]]
        until(service, "wikiclip_queue_images", len(images) - 1.0)
        encoder.gate.set()
        assert all(each.result(TIMEOUT_S).status_code == 200 for each in asked)
    assert encoder.sizes == [1, 8, len(images) - 9]


def test_concurrent_equal_images_are_encoded_once(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, service, images[0]) for _ in range(8)]
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        until(service, "wikiclip_in_flight_images", 8.0)
        encoder.gate.set()
        answers = [each.result(TIMEOUT_S) for each in asked]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["request_id"] for answer in answers}) == 8
    assert encoder.sizes == [1]


def test_concurrent_requests_with_different_options_encode_an_image_once(serve, small_bundle, encoder, images):
    def ask_for(top_k: int):
        headers = {"Content-Type": "image/png"}
        return service.post("/recognize", params={"top_k": top_k}, content=images[0], headers=headers)

    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask_for, top_k) for top_k in (1, 2, 3, 4)]
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        until(service, "wikiclip_in_flight_images", 4.0)
        encoder.gate.set()
        answers = [each.result(TIMEOUT_S).json() for each in asked]
        until(service, 'wikiclip_images_total{outcome="answered"}', 4.0)
    assert [len(answer["predictions"]) for answer in answers] == [1, 2, 3, 4]
    assert sorted(answer["cached"] for answer in answers) == [False, True, True, True]
    assert encoder.sizes == [1]


def test_past_the_deadline_is_a_504_and_waiting_images_are_dropped(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder, deadline_ms=DEADLINE_MS) as service, ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        late = [pool.submit(ask, service, image) for image in images[1:3]]
        answers = [each.result(TIMEOUT_S) for each in (first, *late)]
        assert [answer.status_code for answer in answers] == [504] * 3
        assert f"{DEADLINE_MS} ms" in answers[0].json()["detail"]
        until(service, 'wikiclip_images_total{outcome="deadline"}', 3.0)
        until(service, "wikiclip_queue_images", 0.0)
        encoder.gate.set()
        assert ask(service, images[3]).status_code == 200
    assert encoder.sizes == [1, 1]  # the two that waited were dropped


@pytest.mark.parametrize("late", [True, False])
def test_bodies_are_dropped_with_their_requests(serve, small_bundle, encoder, images, late):
    """Images that are late, or whose client left, are freed while the engine is still busy."""
    bodies = [image + bytes(4_000_000) for image in images[:3]]
    deadline_ms = DEADLINE_MS if late else 1000 * TIMEOUT_S
    with serve(small_bundle, encoder=encoder, deadline_ms=deadline_ms) as service, ThreadPoolExecutor(3) as pool:
        tracemalloc.start()
        try:
            if late:
                statuses = {answer.status_code for answer in pool.map(partial(ask, service), bodies)}
                assert 504 in statuses
                assert statuses <= {504, 429}  # 429: on a busy machine, an image may be refused before it is decoded
            else:
                with ExitStack() as leaving:
                    for body in bodies:
                        address = (service.base_url.host, service.base_url.port)
                        client = leaving.enter_context(socket.create_connection(address, TIMEOUT_S))
                        head = "POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
                        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    until(service, "wikiclip_in_flight_images", 3.0)
                    assert encoder.entered.acquire(timeout=TIMEOUT_S)  # the engine is at one of them
            until(service, "wikiclip_in_flight_images", 0.0)
            over_at = time.monotonic() + TIMEOUT_S
            while tracemalloc.get_traced_memory()[0] > 6_000_000:  # of 12 MB: the engine is at one body
                assert time.monotonic() < over_at, "the bodies are still in memory"
                gc.collect()  # the clients have reference cycles
                time.sleep(0.05)  # decoders may still be at the others
        finally:
            tracemalloc.stop()
        encoder.gate.set()


def test_a_full_queue_is_a_429_with_retry_after(serve, small_bundle, encoder, images):
    with (
        serve(small_bundle, encoder=encoder, queue_limit=3, max_batch_images=3) as service,
        ThreadPoolExecutor(3) as pool,
    ):
        asked = [pool.submit(ask, service, image) for image in images[:2]]
        until(service, "wikiclip_in_flight_images", 2.0)
        refused = service.post("/recognize/batch", files=[("image", image) for image in images[2:4]])
        assert refused.status_code == 429
        assert refused.headers["content-type"] == "application/problem+json"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        asked.append(pool.submit(ask, service, images[2]))  # there is room for one
        until(service, "wikiclip_in_flight_images", 3.0)
        assert ask(service, images[3]).status_code == 429
        assert service.get("/readyz").status_code == 200  # busy is not broken
        until(service, 'wikiclip_images_total{outcome="full"}', 3.0)
        encoder.gate.set()
        assert all(each.result(TIMEOUT_S).status_code == 200 for each in asked)
        assert ask(service, images[3]).status_code == 200


def test_bodies_together_are_limited(serve, small_bundle, encoder, images):
    large = images[0] + bytes(60_000)
    with (
        serve(small_bundle, encoder=encoder, cache="off", body_budget_bytes=100_000) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(ask, service, large)
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        refused = ask(service, large)  # the first body is in memory until its request is answered
        assert refused.status_code == 429
        assert "of 100000 bytes" in refused.json()["detail"]
        assert refused.headers["retry-after"] == "1"
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200
        for _ in range(3):
            assert ask(service, large).status_code == 200


@pytest.mark.parametrize("own_id", [{"X-Request-ID": "mine"}, {"X-Request-ID": "0" * 32}, {}])
def test_a_refusal_is_a_complete_response(serve, small_bundle, encoder, images, caplog, own_id):
    caplog.set_level("INFO", "wikiclip.access")
    settings = {"queue_limit": 1, "max_batch_images": 1, "cors_origins": ("https://a.example",)}
    with serve(small_bundle, encoder=encoder, **settings) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        headers = {"Content-Type": "image/png", **own_id}
        plain = [service.post("/recognize", content=images[1], headers=headers) for _ in range(2)]
        cross_origin = service.post("/recognize", content=images[1], headers={**headers, "Origin": "https://a.example"})
        assert cross_origin.headers["access-control-allow-origin"] == "https://a.example"
        not_found = service.get("/entities/nothing")
        for refused in (*plain, cross_origin):
            assert refused.status_code == 429
            problem = refused.json()
            assert set(problem) == {"type", "title", "status", "detail", "request_id"}
            assert refused.headers["x-request-id"] == problem["request_id"]
            assert problem["request_id"] == own_id.get("X-Request-ID", problem["request_id"])
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert set(not_found.headers) <= set(refused.headers)  # security headers among them
        if not own_id:
            assert len({refused.headers["x-request-id"] for refused in (*plain, cross_origin)}) == 3
        assert service.get("/livez").status_code == 200  # on the same connection, after a body that was not read
        until(service, 'wikiclip_requests_total{route="/recognize",status="429"}', 3.0)
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200
    assert [record.getMessage() for record in caplog.records].count("POST /recognize 429") == 3


def response_head(connection: socket.socket) -> bytes:
    """Read one whole response and return its head."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += (chunk := connection.recv(65536))
        assert chunk, received
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower()).group(1))
    while len(body) < length:
        body += (chunk := connection.recv(65536))
        assert chunk, received
    assert len(body) == length
    return head


def test_a_connection_stays_usable_after_a_refusal(serve, small_bundle, encoder, images):
    head = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
    with_length = head + b"Content-Length: 8\r\n"
    kept_alive = {
        "in one piece": [with_length + b"\r\n12345678"],
        "body in pieces": [with_length + b"\r\n", b"1234", b"5678"],
        "head in pieces": [head[:40], head[40:] + b"Content-Length: 8\r\n\r\n123", b"45678"],
        "chunked": [head + b"Transfer-Encoding: chunked\r\n\r\n4\r\n", b"1234\r\n", b"0\r\n\r\n"],
        "percent-encoded path": [with_length.replace(b"/recognize", b"/r%65cognize") + b"\r\n12345678"],
        "empty body": [head + b"Content-Length: 0\r\n\r\n"],
    }
    with (
        serve(small_bundle, encoder=encoder, queue_limit=1, max_batch_images=1) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        with socket.create_connection((service.base_url.host, service.base_url.port), TIMEOUT_S) as connection:
            for name, pieces in kept_alive.items():
                for piece in pieces:
                    connection.sendall(piece)
                assert response_head(connection).startswith(b"HTTP/1.1 429 "), name
            connection.sendall(with_length + b"\r\n12345678" + b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            received = b""
            while not received.endswith(b'{"status":"alive"}'):
                received += (chunk := connection.recv(65536))
                assert chunk, received
            assert received.startswith(b"HTTP/1.1 429 ")
        closed = {
            "Connection: close": with_length + b"Connection: close\r\n\r\n12345678",
            "HTTP/1.0": with_length.replace(b"HTTP/1.1", b"HTTP/1.0") + b"\r\n12345678",
            "Expect: 100-continue": with_length + b"Expect: 100-continue\r\n\r\n",
        }
        for name, request in closed.items():
            with socket.create_connection((service.base_url.host, service.base_url.port), TIMEOUT_S) as connection:
                connection.sendall(request)
                head = response_head(connection)
                assert head.startswith(b"HTTP/1.1 429 "), name
                assert b"connection: close" in head.lower(), name
                assert connection.recv(1) == b"", name
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200


def test_an_idle_connection_is_closed_after_an_early_response(serve, small_bundle, encoder, images, monkeypatch):
    monkeypatch.setattr("service.server.KEEP_ALIVE_S", 5)
    head = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 8\r\n\r\n"
    with (
        serve(small_bundle, encoder=encoder, queue_limit=1, max_batch_images=1) as service,
        ThreadPoolExecutor(1) as pool,
        ExitStack() as stack,
    ):
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        address = (service.base_url.host, service.base_url.port)
        connections = [stack.enter_context(socket.create_connection(address, TIMEOUT_S)) for _ in range(2)]
        for connection, path, status in zip(connections, (b"/recognize", b"/nowhere"), (b"429", b"404"), strict=True):
            connection.sendall(head % path)
            assert response_head(connection).startswith(b"HTTP/1.1 " + status)
            connection.sendall(b"12345678")
        # uvicorn's keep-alive timeout closes both. Otherwise recv would raise TimeoutError.
        assert [connection.recv(1) for connection in connections] == [b"", b""]
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200


def test_a_disconnected_client_frees_its_place_and_is_not_encoded(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        with socket.create_connection((service.base_url.host, service.base_url.port)) as leaving:
            head = f"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(images[1])}"
            leaving.sendall(head.encode() + b"\r\n\r\n" + images[1])
            until(service, "wikiclip_queue_images", 1.0)
        until(service, "wikiclip_in_flight_images", 1.0)
        until(service, "wikiclip_queue_images", 0.0)
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200
        until(service, 'wikiclip_images_total{outcome="abandoned"}', 1.0)
        assert re.search(r'wikiclip_requests_total\{route="/recognize",status="499"\} 1', service.get("/metrics").text)
    assert encoder.sizes == [1]


def test_internal_errors_are_a_500_without_details(serve, small_bundle, images):
    class FaultyEncoder:
        device = "cpu"

        def encode(self, pixels_BHW3):
            raise RuntimeError("internal detail")

    with serve(small_bundle, encoder=FaultyEncoder()) as service:
        answer = ask(service, images[0])
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert "internal detail" not in answer.text
        assert "Traceback" not in answer.text
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert service.get("/readyz").status_code == 200


class DyingEncoder:
    """Kills the engine thread while `dies` is true."""

    device = "cpu"
    heat_maps = True
    dies = True

    def encode(self, pixels_BHW3):
        if self.dies:
            raise SystemExit
        return np.ones((len(pixels_BHW3), 16), np.float32)


def test_an_engine_that_dies_is_replaced(serve, small_bundle, images):
    encoder = DyingEncoder()
    with serve(small_bundle, encoder=encoder) as service:
        assert [ask(service, image).status_code for image in images[:2]] == [500, 500]
        encoder.dies = False
        assert [ask(service, image).status_code for image in images[:2]] == [200, 200]
        encoder.dies = True
        assert [ask(service, image).status_code for image in images[2:4]] == [500, 500]
        assert service.get("/readyz").status_code == 200
        until(service, "wikiclip_engine_deaths_total", 8.0)  # each image was tried twice


def test_a_dead_engine_is_not_ready_but_alive(serve, small_bundle, images):
    with serve(small_bundle, encoder=DyingEncoder()) as service:
        assert [ask(service, image).status_code for image in images[:3]] == [500] * 3
        until(service, "wikiclip_ready", 0.0)
        refused = service.get("/readyz")
        assert (refused.status_code, refused.json()["title"]) == (503, "Not ready")
        assert ask(service, images[0]).status_code == 503
        assert service.get("/livez").status_code == 200
        assert service.get("/info").status_code == 200


def test_stuck_decoders_are_not_ready_but_alive_until_one_moves(serve, small_bundle, images, monkeypatch):
    gate, load_region = threading.Event(), decoder.load_region

    def stuck(*arguments, **options):
        assert gate.wait(TIMEOUT_S)
        return load_region(*arguments, **options)

    monkeypatch.setattr(decoder, "load_region", stuck)
    with serve(small_bundle, deadline_ms=DEADLINE_MS, stuck_ms=DEADLINE_MS) as service:  # with two decoders
        try:
            assert ask(service, images[0]).status_code == 504
            assert service.get("/readyz").status_code == 200
            assert ask(service, images[1]).status_code == 504
            until(service, "wikiclip_ready", 0.0)
            assert "all decoders have been stuck" in service.get("/readyz").json()["detail"]
            assert ask(service, images[2]).status_code == 503
            assert service.get("/livez").status_code == 200
        finally:
            gate.set()
        until(service, "wikiclip_ready", 1.0)
        assert ask(service, images[2]).status_code == 200


def test_a_stuck_engine_is_not_ready_but_alive_until_it_moves(serve, small_bundle, encoder, images):
    settings = {"deadline_ms": DEADLINE_MS, "stuck_ms": DEADLINE_MS}
    with serve(small_bundle, encoder=encoder, **settings) as service:
        encoder.gate.clear()
        assert ask(service, images[0]).status_code == 504
        until(service, "wikiclip_ready", 0.0)
        assert "stuck" in service.get("/readyz").json()["detail"]
        assert ask(service, images[1]).status_code == 503  # refused at once, not after the deadline
        assert service.get("/livez").status_code == 200
        encoder.gate.set()
        until(service, "wikiclip_ready", 1.0)
        assert ask(service, images[1]).status_code == 200
