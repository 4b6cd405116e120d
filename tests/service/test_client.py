"""The client, against the service and against small servers that refuse."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.errors import TooManyRequests, Unavailable, Unprocessable, UserError
from wikiclip.answers import RecognizeOptions
from wikiclip.client import AsyncClient, Client


def test_an_answer_as_the_recogniser_gives_it(service, small_images):
    with Client(str(service.base_url)) as client:
        options = RecognizeOptions(top_k=2, types=("animal", "fruit"), lang="fr", min_score=-1.0, box=(0, 0, 1, 1))
        answer = client.recognize(small_images["Q15083"], options)
        assert client.info().bundle == answer.bundle
    assert answer.predictions[0].title == "Girafe"
    assert len(answer.predictions) == 2
    assert answer.predictions[0].types == ("animal",)
    assert answer.abstained is False


def test_many_at_once_from_one_event_loop(service, small_images):
    async def ask_all():
        async with AsyncClient(str(service.base_url)) as client:
            info = await client.info()
            return info, await asyncio.gather(*(client.recognize(image) for image in small_images.values()))

    info, answers = asyncio.run(ask_all())
    assert [answer.predictions[0].entity_id for answer in answers] == list(small_images)
    assert {answer.bundle for answer in answers} == {info.bundle}


def test_a_refusal_is_the_error_it_stands_for(service):
    with Client(str(service.base_url)) as client, pytest.raises(Unprocessable, match="not an image"):
        client.recognize(b"no image")


@contextmanager
def scripted(*answers: tuple[int, dict[str, str], object]) -> Iterator[tuple[str, list[float]]]:
    """A server that gives these answers in turn, none for status 0; yields its URL and the times at which it was asked.

    Each connection ends with its answer.
    """
    left, asked_at = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked_at.append(time.monotonic())
            status, headers, content = left.pop(0)
            if status == 0:
                return
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked_at
        finally:
            server.shutdown()
            thread.join()


ANSWER = {
    "model": "m",
    "bundle": "b@1",
    "cached": False,
    "known": None,
    "abstained": None,
    "predictions": [],
    "timings_ms": {},
}


def recognize(url: str, image: bytes, way: str, **given):
    """Ask with either client."""
    if way == "blocking":
        with Client(url, **given) as client:
            return client.recognize(image)

    async def ask():
        async with AsyncClient(url, **given) as client:
            return await client.recognize(image)

    return asyncio.run(ask())


both = pytest.mark.parametrize("way", ["blocking", "async"])


@both
def test_retry_after_is_honoured(way):
    refusals = (429, {"Retry-After": "1"}, {"detail": "full"}), (503, {"Retry-After": "\xb2"}, {"detail": "x"})
    with scripted(*refusals, (200, {}, ANSWER)) as (url, asked_at):
        assert recognize(url, b"x", way).bundle == "b@1"
    assert len(asked_at) == 3
    assert asked_at[1] - asked_at[0] >= 1.0
    assert asked_at[2] - asked_at[1] >= 0.3  # of its own: 0.4 s or so the second time


@both
def test_retries_end(way):
    with scripted(*[(429, {}, {"detail": "full"})] * 3) as (url, asked_at):
        with pytest.raises(TooManyRequests, match="full"):
            recognize(url, b"x", way, retries=2)
        assert len(asked_at) == 3


@both
def test_what_asking_again_cannot_help_is_not_asked_again(way):
    with scripted((422, {}, {"detail": "bad"})) as (url, asked_at):
        with pytest.raises(Unprocessable, match="bad"):
            recognize(url, b"x", way)
        assert len(asked_at) == 1


BROKEN_OFF = 200, {"Content-Length": "9999"}, ANSWER


@both
@pytest.mark.parametrize("broken", [(0, {}, None), BROKEN_OFF])
def test_who_is_gone_before_the_answer_is_whole_is_asked_again(way, broken):
    with scripted(broken, (200, {}, ANSWER)) as (url, asked_at):
        assert recognize(url, b"x", way).bundle == "b@1"
    assert len(asked_at) == 2


@both
def test_an_answer_that_is_never_whole_is_an_error(way):
    with scripted(*[BROKEN_OFF] * 2) as (url, asked_at):
        with pytest.raises(Unavailable, match="is the service running"):
            recognize(url, b"x", way, retries=1)
        assert len(asked_at) == 2


@pytest.mark.parametrize("answer", [(200, {}, {"hello": 1}), (404, {}, ["?"])])
def test_another_kind_of_server_is_told_as_such(answer):
    with scripted(answer) as (url, _), Client(url) as client, pytest.raises(UserError, match="WikiCLIP service"):
        client.recognize(b"x")


@both
def test_nobody_there(way):
    with pytest.raises(Unavailable, match="is the service running"):
        recognize("http://127.0.0.1:9", b"x", way, retries=0)
