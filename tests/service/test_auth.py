"""API keys and the admin token."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request

from core.errors import Forbidden, Unauthorized, UserError
from service.auth import require_admin
from service.settings import Settings, load_settings
from wikiclip.client import Client

KEYS = ("first-key", "sha256:" + hashlib.sha256("zweiter Schlüssel".encode()).hexdigest())
TOKEN = "let-me-change-things"
DIGEST = "sha256:" + hashlib.sha256(TOKEN.encode()).hexdigest()


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
def test_every_key_is_accepted_in_either_header(guarded, giraffe, headers):
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
def test_missing_and_unknown_keys_get_401(guarded, giraffe, headers):
    answer = ask(guarded, giraffe, headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["type"] == "/docs#problem-unauthorized"
    assert "wrong" not in answer.text


@pytest.mark.parametrize("path", ["/entities?query=lion", "/entities/Q140", "/entities/Q140/thumbnail"])
def test_entities_need_a_key(guarded, path):
    assert guarded.get(path).status_code == 401
    assert guarded.get(path, headers={"X-API-Key": "first-key"}).status_code in (200, 404)


def test_keys_are_checked_before_parameters(guarded):
    assert guarded.post("/recognize?top_k=0", content=b"x").status_code == 401
    assert guarded.post("/recognize/batch", content=b"x").status_code == 401


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/metrics", "/info", "/docs", "/openapi.json", "/", "/page/page.js", "/docs/docs.js"]
)
def test_operations_and_pages_need_no_key(guarded, path):
    assert guarded.get(path).status_code == 200


def test_a_large_body_without_a_key_gets_401(guarded):
    assert ask(guarded, b"\0" * (4 * 1024**2), {}).status_code == 401
    assert guarded.get("/livez").status_code == 200


def test_the_api_description_lists_keys_only_if_they_are_needed(guarded, service):
    guarded_document, open_document = (client.get("/openapi.json").json() for client in (guarded, service))
    assert guarded_document["paths"]["/recognize"]["post"]["security"] == [{"bearer": []}, {"header": []}]
    assert "security" not in guarded_document["paths"]["/info"]["get"]
    assert "security" not in open_document["paths"]["/recognize"]["post"]


def test_the_client_sends_its_key(guarded, giraffe):
    with Client(str(guarded.base_url), api_key="zweiter Schlüssel") as client:
        assert client.recognize(giraffe).predictions[0].entity_id == "Q15083"
    with Client(str(guarded.base_url)) as client, pytest.raises(Unauthorized):
        client.recognize(giraffe)


def check(headers: dict[str, str], token: str | None) -> None:
    app = Starlette()
    app.state.admin_token = Settings(admin_token=token).admin_token
    asyncio.run(require_admin(Request({"type": "http", "app": app, "headers": Headers(headers).raw})))


@pytest.mark.parametrize("setting", [TOKEN, DIGEST, DIGEST.upper().replace("SHA256", "sha256")])
@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {TOKEN}"}, {"x-api-key": TOKEN}])
def test_the_admin_token_is_accepted(setting, headers):
    check(headers, setting)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {DIGEST}"}],
)
def test_other_admin_tokens_are_refused(headers):
    with pytest.raises(Unauthorized, match="admin token"):
        check(headers, TOKEN)


@pytest.mark.parametrize("setting", [None, ""])
def test_without_an_admin_token_changes_are_forbidden(setting):
    with pytest.raises(Forbidden, match="WIKICLIP_ADMIN_TOKEN"):
        check({"authorization": "Bearer "}, setting)


def test_the_admin_token_is_never_shown():
    settings = Settings(admin_token=TOKEN)
    assert TOKEN not in repr(settings)
    assert settings.admin_token == DIGEST
    with pytest.raises(UserError) as error:
        load_settings(admin_token="sha256:" + TOKEN)
    assert TOKEN not in str(error.value)
