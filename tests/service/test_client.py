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

import wikiclip
from core.errors import TooManyRequests, Unavailable, Unprocessable, UserError
from wikiclip.answers import EntityRequest, Problem, Recognition, RecognizeOptions
from wikiclip.client import AsyncClient, Client

both = pytest.mark.parametrize("way", ["blocking", "async"])


@contextmanager
def connected(url: str, way: str, **given):
    """Yields what returns the answer of an operation of a client of either kind."""
    if way == "blocking":
        with Client(url, **given) as client:
            yield lambda operation: operation(client)
    else:
        client = AsyncClient(url, **given)
        with asyncio.Runner() as runner:
            try:
                yield lambda operation: runner.run(operation(client))
            finally:
                runner.run(client.close())


def ask(url: str, way: str, operation, **given):
    with connected(url, way, **given) as call:
        return call(operation)


@both
def test_every_operation(serve, small_bundle, small_images, tmp_path, way):
    giraffe, lion = tmp_path / "giraffe.png", small_images["Q140"]
    giraffe.write_bytes(small_images["Q15083"])
    okapi = EntityRequest(title="Okapi", types=["animal"], embedding=[1.0] * 16)
    settings = {"live_dir": tmp_path / "live", "api_keys": ("key",), "admin_token": "token"}
    with (
        serve(small_bundle, **settings) as service,
        connected(str(service.base_url), way, api_key="key", admin_token="token") as call,
    ):
        with giraffe.open("rb") as file:
            for image in (giraffe, str(giraffe), file):
                answer = call(lambda client, image=image: client.recognize(image))
                assert answer.predictions[0].entity_id == "Q15083"
                assert answer.request_id
        found = call(lambda client: client.recognize_batch([lion, b"no image", giraffe], RecognizeOptions(top_k=1)))
        assert [type(each) for each in found.results] == [Recognition, Problem, Recognition]
        assert [each.request_id for each in found.results] == [found.request_id] * 3

        added = call(lambda client: client.put_entity("new/okapi?", okapi))
        assert added.bundle.endswith("+1")
        stored = call(lambda client: client.get_entity("new/okapi?"))
        assert (stored.title, stored.types) == ("Okapi", ("animal",))
        assert stored.request_id not in ("", added.request_id)
        assert [each.title for each in call(lambda client: client.search_entities("oka")).entities] == ["Okapi"]
        assert len(call(lambda client: client.sample_entities(limit=2)).entities) == 2
        vector = call(lambda client: client.embed(lion))
        for content in ({"image": giraffe}, {"embedding": vector}):
            image = call(lambda client, content=content: client.add_image("new/okapi?", **content))
            assert call(lambda client: client.get_entity("new/okapi?")).image_ids == (image.image_id,)
            assert call(lambda client, image=image: client.remove_image("new/okapi?", image.image_id)) is None
        with pytest.raises(wikiclip.Conflict):
            call(lambda client: client.remove_image("Q140", "base-0"))
        with pytest.raises(UserError, match="either an image or an embedding"):
            call(lambda client: client.add_image("Q140"))
        assert call(lambda client: client.delete_entity("new/okapi?")) is None
        with pytest.raises(wikiclip.NotFound) as gone:
            call(lambda client: client.get_entity("new/okapi?"))
        assert len(gone.value.request_id) == 32
        pictured = EntityRequest(title="Okapi", text="A giraffid.")
        with pytest.raises(Unprocessable, match="no entity encoder"):  # the form was read
            call(lambda client: client.put_entity("okapi", pictured, [giraffe, lion]))
        for by_url in (
            lambda client: client.recognize("https://a.org/b.png"),
            lambda client: client.put_entity("okapi", pictured, "https://a.org/b.png"),
        ):
            with pytest.raises(wikiclip.Forbidden, match="URL"):
                call(by_url)

        assert call(lambda client: client.get_thumbnail("Q13191")).startswith(b"RIFF")
        change = call(lambda client: client.swap_bundle(str(small_bundle)))
        assert change.bundle.startswith("small@")
        assert call(lambda client: client.info()).limits["max_batch_images"] == 32
        assert call(lambda client: client.live()).status == "alive"
        assert call(lambda client: client.ready()).status == "ready"
        with pytest.raises(wikiclip.Unauthorized):
            ask(str(service.base_url), way, lambda client: client.recognize(lion))


def test_images_that_cannot_be_sent(tmp_path):
    (tmp_path / "page.html").write_text("text")
    with Client("http://127.0.0.1:9") as client, (tmp_path / "page.html").open() as file:
        with pytest.raises(UserError, match="'rb'"):
            client.recognize(file)
        with pytest.raises(UserError, match="by itself"):
            client.recognize_batch(["https://a.org/b.png"])
        with pytest.raises(FileNotFoundError):
            client.recognize("missing.png")


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
    return ask(url, way, lambda client: client.recognize(image), **given)


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
def test_a_proxy_and_a_deadline_are_asked_again_but_a_swap_that_may_have_begun_is_not(way):
    refusals = [(502, {}, None), (504, {}, {"detail": "late"})]
    with scripted(*refusals, (200, {}, ANSWER)) as (url, asked_at):
        assert recognize(url, b"x", way).bundle == "b@1"
        assert len(asked_at) == 3
    with scripted((503, {}, {"detail": "not ready"}), *refusals) as (url, asked_at):
        with pytest.raises(wikiclip.BadGateway):
            ask(url, way, lambda client: client.swap_bundle("new"))
        assert len(asked_at) == 2


def test_each_status_has_its_error_and_the_services_own_are_no_user_errors():
    kinds = {
        400: wikiclip.BadRequest,
        401: wikiclip.Unauthorized,
        403: wikiclip.Forbidden,
        404: wikiclip.NotFound,
        405: UserError,
        408: wikiclip.SlowRequest,
        409: wikiclip.Conflict,
        413: wikiclip.TooLarge,
        415: wikiclip.UnsupportedMediaType,
        422: wikiclip.Unprocessable,
        429: wikiclip.TooManyRequests,
        431: wikiclip.HeadTooLarge,
        500: wikiclip.InternalError,
        502: wikiclip.BadGateway,
        503: wikiclip.Unavailable,
        504: wikiclip.DeadlineExceeded,
        507: wikiclip.ServiceError,
    }
    answers = [(status, {"X-Request-ID": f"id{status}"}, {"detail": f"why {status}"}) for status in kinds]
    with scripted(*answers) as (url, _), Client(url, retries=0) as client:
        for status, kind in kinds.items():
            with pytest.raises(wikiclip.WikiclipError, match=f"why {status}") as error:
                client.recognize(b"x")
            assert type(error.value) is kind
            assert (error.value.status, error.value.request_id) == (status, f"id{status}")
            assert isinstance(error.value, UserError) == (status < 500 and status != 409)


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
