"""API keys: who is let in, and what stays open."""

from __future__ import annotations

import hashlib

import pytest

from core.errors import Unauthorized
from wikiclip.client import Client

KEYS = ("first-key", "sha256:" + hashlib.sha256("zweiter Schlüssel".encode()).hexdigest())


@pytest.fixture(scope="module")
def guarded(serve, small_bundle):
    with serve(small_bundle, api_keys=KEYS) as client:
        yield client


def ask(guarded, image, headers):
    return guarded.post("/recognize", content=image, headers={"Content-Type": "image/png", **headers})


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer first-key"},
        {"X-API-Key": "first-key"},
        {"X-API-Key": "zweiter Schlüssel".encode()},
    ],
)
def test_each_key_opens_in_each_header(guarded, giraffe, headers):
    assert ask(guarded, giraffe, headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic first-key"},
        {"X-API-Key": KEYS[1]},
        {"X-API-Key": b"\xff"},
        {"Authorization": "Bearer wrong", "X-API-Key": "first-key"},
    ],
)
def test_without_a_known_key_there_is_a_401(guarded, giraffe, headers):
    answer = ask(guarded, giraffe, headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["type"] == "/docs#problem-unauthorized"
    assert "wrong" not in answer.text


@pytest.mark.parametrize("path", ["/entities?query=lion", "/entities/Q140", "/entities/Q140/thumbnail"])
def test_entities_are_behind_the_keys(guarded, path):
    assert guarded.get(path).status_code == 401
    assert guarded.get(path, headers={"X-API-Key": "first-key"}).status_code in (200, 404)


def test_a_parameter_is_not_judged_before_the_key(guarded):
    assert guarded.post("/recognize?top_k=0", content=b"x").status_code == 401
    assert guarded.post("/recognize/batch", content=b"x").status_code == 401


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/info", "/docs", "/openapi.json", "/", "/page/page.js", "/docs/docs.js"]
)
def test_operations_and_pages_stay_open(guarded, path):
    assert guarded.get(path).status_code == 200


def test_a_large_body_without_a_key_still_gets_its_answer(guarded):
    assert ask(guarded, b"\0" * (4 * 1024**2), {}).status_code == 401
    assert guarded.get("/livez").status_code == 200


def test_the_api_description_tells_of_keys_only_where_they_are_needed(guarded, service):
    guarded_document, open_document = (client.get("/openapi.json").json() for client in (guarded, service))
    assert guarded_document["paths"]["/recognize"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in guarded_document["paths"]["/info"]["get"]
    assert "security" not in open_document["paths"]["/recognize"]["post"]


def test_the_client_sends_its_key(guarded, giraffe):
    with Client(str(guarded.base_url), api_key="zweiter Schlüssel") as client:
        assert client.recognize(giraffe).predictions[0].entity_id == "Q15083"
    with Client(str(guarded.base_url)) as client, pytest.raises(Unauthorized):
        client.recognize(giraffe)
