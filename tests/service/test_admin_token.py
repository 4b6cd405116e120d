"""The admin token: who may change what is served."""

from __future__ import annotations

import hashlib

import pytest
from starlette.datastructures import Headers

from core.errors import Forbidden, Unauthorized, UserError
from service.auth import AdminToken
from service.settings import Settings, load_settings

TOKEN = "let-me-change-things"
DIGEST = "sha256:" + hashlib.sha256(TOKEN.encode()).hexdigest()


def token(given: str | None) -> AdminToken:
    return AdminToken(Settings(admin_token=given).admin_token)


@pytest.mark.parametrize("given", [TOKEN, DIGEST, DIGEST.upper().replace("SHA256", "sha256")])
@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {TOKEN}"}, {"x-api-key": TOKEN}])
def test_its_holder_may(given, headers):
    token(given).check(Headers(headers))


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {DIGEST}"}],
)
def test_others_may_not(headers):
    with pytest.raises(Unauthorized, match="admin token"):
        token(TOKEN).check(Headers(headers))


@pytest.mark.parametrize("given", [None, ""])
def test_without_one_nobody_may(given):
    with pytest.raises(Forbidden, match="WIKICLIP_ADMIN_TOKEN"):
        token(given).check(Headers({"authorization": "Bearer "}))


def test_it_is_never_told():
    settings = Settings(admin_token=TOKEN)
    assert TOKEN not in repr(settings)
    assert settings.admin_token == DIGEST
    with pytest.raises(UserError) as error:
        load_settings(admin_token="sha256:" + TOKEN)
    assert TOKEN not in str(error.value)
