"""Extreme images in a service with a small budget: ordinary requests are answered meanwhile, and nothing is left."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from benchmarks.extreme import jpeg, tiff_fax, tiff_tile, webp

TIMEOUT_S = 60  # long enough for a busy machine
SLOW = jpeg(1448, scans=100_000)  # a minute and more
STATUSES = {413, 422, 429}


def decoders() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "imaging.process" in " ".join(child.cmdline())]


def ask(service, body: bytes):
    return service.post("/recognize", content=body, headers={"Content-Type": "image/png"}, timeout=TIMEOUT_S)


@pytest.fixture
def strict(serve, small_bundle):
    earlier = decoders()
    with serve(
        small_bundle, cache="off", decode_budget_bytes=2**28, decode_timeout_ms=2000, deadline_ms=8000
    ) as service:
        yield service
    assert [process for process in decoders() if process not in earlier] == []


def test_ordinary_images_are_answered_while_extreme_ones_are_refused(strict, giraffe, capfd):
    bodies = [SLOW] * 6 + [webp(8000)] * 4 + [tiff_fax(10**6), tiff_tile(9000), giraffe[:200]]
    with ThreadPoolExecutor(len(bodies)) as pool:
        begun = threading.Barrier(len(bodies) + 1)

        def send(body: bytes):
            begun.wait(TIMEOUT_S)
            return ask(strict, body)

        pending = [pool.submit(send, body) for body in bodies]
        begun.wait(TIMEOUT_S)
        ordinary = [ask(strict, giraffe).status_code for _ in range(20)]
        assert strict.get("/livez").status_code == 200
        answers = [each.result(TIMEOUT_S) for each in pending]
    assert ordinary == [200] * 20
    assert {answer.status_code for answer in answers} <= STATUSES
    assert all(len(answer.json()["detail"]) > 20 for answer in answers)
    assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)
    details = " ".join(answer.json()["detail"] for answer in answers)
    for words in ("longer than 0.55 s", "8000 x 8000 pixels takes", "fax coding", "a tile has 9000 x 9000", "damaged"):
        assert words in details
    assert ask(strict, giraffe).status_code == 200
    assert len(capfd.readouterr().err) < 20_000


def test_a_batch_with_an_extreme_image(strict, giraffe):
    parts = [("image", giraffe), ("image", SLOW), ("image", giraffe)]
    results = strict.post("/recognize/batch", files=parts, timeout=TIMEOUT_S).json()["results"]
    assert ["predictions" in result for result in results] == [True, False, True]
    assert results[1]["status"] == 422
