"""The load generator: what it sends, and how it counts responses."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import generator
from benchmarks.generator import Job, Response, closed_loop, generate, service_process, split_cores, summarise


@pytest.fixture(scope="module")
def url(small_bundle: Path) -> Iterator[str]:
    with service_process(small_bundle, "--threads", "1") as (_, url):
        yield f"{url}/recognize"


@pytest.fixture
def images(small_images: dict[str, bytes], tmp_path: Path) -> list[str]:
    """A valid image and an invalid one."""
    paths = [tmp_path / "image.jpg", tmp_path / "broken.jpg"]
    paths[0].write_bytes(small_images["Q15083"])
    paths[1].write_bytes(b"no image")
    return [str(path) for path in paths]


@pytest.mark.parametrize(("form_field", "poll"), [("image", False), (None, False), (None, True)])
def test_a_closed_loop_counts_answers_and_failures(
    url: str, images: list[str], form_field: str | None, poll: bool
) -> None:
    job = Job(
        url=url, images=images, cores=[*os.sched_getaffinity(0)], form_field=form_field, connections=2, seconds=1.0,
        poll=poll,
    )  # fmt: skip
    figures = closed_loop(job, warm_up_s=0.0)
    assert figures["answers"] > 0
    assert set(figures["failures"]) == {"422"}
    assert figures["p50_ms"] <= figures["p99_ms"]


def test_an_open_loop_does_not_wait_for_responses(url: str, images: list[str]) -> None:
    cores, _ = split_cores()
    (run,) = generate([Job(url=url, images=images, cores=[*cores], phases=((20.0, 1.0), (10.0, 1.0)))])
    assert run.responses
    assert {each.status for each in run.responses} <= {200, 422}
    assert all(each.at_s >= 0 for each in run.responses)


def test_only_requests_that_end_after_the_warm_up_count() -> None:
    responses = [
        Response(0.5, 400.0, 200, False, ""),
        Response(0.9, 200.0, 200, False, ""),
        Response(1.5, 100.0, 429, True, ""),
        Response(1.6, 100.0, 0, False, "TimeoutError"),
        Response(2.9, 200.0, 200, False, ""),
    ]
    figures = summarise(responses, warm_up_s=1.0, seconds=2.0)
    assert figures["per_s"] == 0.5
    assert figures["p99_ms"] == 200.0
    assert figures["failures"] == {"429": 1, "TimeoutError": 1}


def respond_with(pieces: list[bytes], image: str) -> Response:
    """Return the first response of a generator to a server that sends these pieces once."""

    def serve() -> None:
        with listening, listening.accept()[0] as accepted:
            received = b""
            while len(received.partition(b"\r\n\r\n")[2]) < body_bytes:
                received += accepted.recv(65536)
            for piece in pieces:
                accepted.sendall(piece)

    body_bytes = Path(image).stat().st_size + 8  # the generator appends a number
    listening = socket.create_server(("127.0.0.1", 0))
    serving = threading.Thread(target=serve)
    serving.start()
    job = Job(url=f"http://127.0.0.1:{listening.getsockname()[1]}/", images=[image], cores=[], seconds=0.001)
    response = generator.run_job(job).responses[0]
    serving.join()
    return response


def test_an_answer_may_come_in_pieces(images: list[str]) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nRetry-After: 1\r\nContent-"
    response = respond_with([head, b"Length: 4\r\n\r\nbo", b"dy"], images[0])
    assert (response.status, response.retry_after, response.error) == (200, True, "")


@pytest.mark.parametrize("pieces", [[], [b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbo"], [b"not HTTP\r\n\r\n"]])
def test_an_incomplete_answer_is_a_failure(images: list[str], pieces: list[bytes]) -> None:
    response = respond_with(pieces, images[0])
    assert response.status == 0
    assert response.error in {"IncompleteReadError", "KeyError"}


def test_a_missing_answer_is_a_failure_after_a_timeout(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        job = Job(url=f"http://127.0.0.1:{port}/", images=images[:1], cores=[], seconds=0.01)
        (response,) = generator.run_job(job).responses
    assert (response.status, response.error) == (0, "TimeoutError")
