"""Batching by concurrency, the deadline, a full queue, clients that leave: with an encoder that waits at a gate."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

TIMEOUT_S = 120  # generous: a busy machine is no failure
DEADLINE_MS = 3000  # of tests in which it passes: long enough that a busy machine decodes within it


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
        time.sleep(0.01)  # the state is on the other side of a socket: asking again is all there is
    raise AssertionError(f"{name} never was {value}")


def test_requests_that_wait_are_encoded_together(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(11) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        others = [pool.submit(ask, service, image) for image in images[1:]]
        until(service, "wikiclip_queue_images", len(images) - 1.0)
        encoder.gate.set()
        assert all(each.result(TIMEOUT_S).status_code == 200 for each in (first, *others))
    assert encoder.sizes == [1, len(images) - 1]


def test_equal_images_at_the_same_time_are_encoded_once(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, service, images[0]) for _ in range(8)]
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        until(service, "wikiclip_in_flight_images", 8.0)
        encoder.gate.set()
        answers = [each.result(TIMEOUT_S) for each in asked]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["request_id"] for answer in answers}) == 8
    assert encoder.sizes == [1]


def test_an_image_asked_about_in_several_ways_at_the_same_time_is_encoded_once(serve, small_bundle, encoder, images):
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


def test_past_the_deadline_is_a_504_and_what_waited_costs_nothing(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder, deadline_ms=DEADLINE_MS) as service, ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        late = [pool.submit(ask, service, image) for image in images[1:3]]
        answers = [each.result(TIMEOUT_S) for each in (first, *late)]
        assert [answer.status_code for answer in answers] == [504] * 3
        assert f"{DEADLINE_MS} ms" in answers[0].json()["detail"]
        until(service, 'wikiclip_images_total{outcome="deadline"}', 3.0)
        encoder.gate.set()
        assert ask(service, images[3]).status_code == 200
    assert encoder.sizes == [1, 1]  # the two that waited were dropped


def test_a_full_queue_is_a_429_that_says_when(serve, small_bundle, encoder, images):
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


def test_a_refusal_before_the_app_says_all_that_one_by_the_app_says(serve, small_bundle, encoder, images, caplog):
    caplog.set_level("INFO", "wikiclip.access")
    one_place = {"queue_limit": 1, "max_batch_images": 1, "cors_origins": ("https://a.example",)}
    with serve(small_bundle, encoder=encoder, **one_place) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        headers = {"Content-Type": "image/png", "X-Request-ID": "mine"}
        early = service.post("/recognize", content=images[1], headers=headers)
        # To a page from elsewhere the app itself has to say it: with the headers that let the page read it.
        late = service.post("/recognize", content=images[1], headers={**headers, "Origin": "https://a.example"})
        assert early.status_code == late.status_code == 429
        assert early.json() == late.json()
        assert early.json()["request_id"] == "mine"
        assert "access-control-allow-origin" in late.headers
        assert set(early.headers) == {name for name in late.headers if not name.startswith(("access-control", "vary"))}
        assert service.get("/livez").status_code == 200  # by the same connection, after the body that nobody read
        until(service, 'wikiclip_requests_total{route="/recognize",status="429"}', 2.0)
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200
    assert [record.getMessage() for record in caplog.records].count("POST /recognize 429") == 2


def test_a_client_that_leaves_frees_its_place_and_is_not_computed_for(serve, small_bundle, encoder, images):
    with serve(small_bundle, encoder=encoder) as service, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, service, images[0])
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        with socket.create_connection((service.base_url.host, service.base_url.port)) as leaving:
            head = f"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(images[1])}"
            leaving.sendall(head.encode() + b"\r\n\r\n" + images[1])
            until(service, "wikiclip_queue_images", 1.0)
        until(service, "wikiclip_in_flight_images", 1.0)
        encoder.gate.set()
        assert first.result(TIMEOUT_S).status_code == 200
        until(service, 'wikiclip_images_total{outcome="abandoned"}', 1.0)
        assert re.search(r'wikiclip_requests_total\{route="/recognize",status="499"\} 1', service.get("/metrics").text)
    assert encoder.sizes == [1]


def test_a_fault_of_ours_is_a_500_that_tells_nothing(serve, small_bundle, images):
    class FaultyEncoder:
        device = "cpu"

        def encode(self, pixels_BHW3):
            raise RuntimeError("secret of the house")

    with serve(small_bundle, encoder=FaultyEncoder()) as service:
        answer = ask(service, images[0])
        assert answer.status_code == 500
        assert answer.headers["content-type"] == "application/problem+json"
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert service.get("/readyz").status_code == 200


class MoodyEncoder:
    """Dies in the mood for it."""

    device = "cpu"
    dies = True

    def encode(self, pixels_BHW3):
        if self.dies:
            raise SystemExit
        return np.ones((len(pixels_BHW3), 16), np.float32)


def test_an_engine_that_dies_is_replaced(serve, small_bundle, images):
    encoder = MoodyEncoder()
    with serve(small_bundle, encoder=encoder) as service:
        assert [ask(service, image).status_code for image in images[:2]] == [500, 500]
        encoder.dies = False
        assert [ask(service, image).status_code for image in images[:2]] == [200, 200]
        encoder.dies = True
        assert [ask(service, image).status_code for image in images[2:4]] == [500, 500]
        assert service.get("/readyz").status_code == 200
        until(service, "wikiclip_engine_deaths_total", 8.0)  # each image was tried twice


def test_a_dead_engine_is_not_ready_but_alive(serve, small_bundle, images):
    with serve(small_bundle, encoder=MoodyEncoder()) as service:
        assert [ask(service, image).status_code for image in images[:3]] == [500] * 3
        until(service, "wikiclip_ready", 0.0)
        refused = service.get("/readyz")
        assert (refused.status_code, refused.json()["title"]) == (503, "Not ready")
        assert ask(service, images[0]).status_code == 503
        assert service.get("/livez").status_code == 200
        assert service.get("/info").status_code == 200


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
