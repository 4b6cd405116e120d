"""API keys and the admin token: who may ask, and who may change what is served.

Both are known by their SHA-256 only and compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers

from core.errors import Forbidden, Unauthorized

DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


def hashed(key: str) -> str:
    """A key as it is held: `sha256:` and its digest in hex; a key given that way stays.

    Raises `ValueError`, which never quotes the key.
    """
    if not key.startswith(DIGEST_PREFIX):
        return DIGEST_PREFIX + hashlib.sha256(key.encode()).hexdigest()
    if not _DIGEST.fullmatch(key):
        raise ValueError("a key that begins with sha256: goes on with 64 hex digits, the SHA-256 of the key itself")
    return key.lower()


class ApiKeys:
    """The keys of a service; without any, everyone may ask."""

    def __init__(self, digests: Sequence[str]) -> None:
        """`digests` as `hashed` gives them."""
        self._digests = _as_bytes(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holder_of(self, headers: Headers) -> str | None:
        """The digest of the key in a request's headers, None where no key is needed. Raises `Unauthorized`."""
        if not self._digests:
            return None
        key = _presented(headers)
        if key is None:
            raise Unauthorized("an API key is needed; send it as Authorization: Bearer KEY or as X-API-Key: KEY")
        digest = hashlib.sha256(key).digest()
        if not _is_any_of(digest, self._digests):
            raise Unauthorized("the API key is not known here; check it, or ask the operator for one")
        return digest.hex()


class AdminToken:
    """The token that lets its holder change what is served; without one, nobody may."""

    def __init__(self, digest: str | None) -> None:
        """`digest` as `hashed` gives it."""
        self._digests = _as_bytes(() if digest is None else (digest,))

    def check(self, headers: Headers) -> None:
        """Raises `Forbidden` where there is no token, `Unauthorized` where the request's is not it."""
        if not self._digests:
            raise Forbidden("changes are off: the service has no admin token; set WIKICLIP_ADMIN_TOKEN to allow them")
        token = _presented(headers)
        if token is None:
            raise Unauthorized("the admin token is needed; send it as Authorization: Bearer TOKEN")
        if not _is_any_of(hashlib.sha256(token).digest(), self._digests):
            raise Unauthorized("this is not the admin token; check it, or ask the operator for it")


def _as_bytes(digests: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(digest.removeprefix(DIGEST_PREFIX)) for digest in digests)


def _is_any_of(digest: bytes, known: Sequence[bytes]) -> bool:
    # A list, not a generator: every one is compared, whichever fits.
    return any([hmac.compare_digest(digest, each) for each in known])  # noqa: C419


def _presented(headers: Headers) -> bytes | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return key.encode("latin-1") or None  # headers come decoded from it: these are the bytes that were sent


async def require_key(request: Request) -> None:
    """Let a request through only with a key, where there are keys; notes who holds it. Raises `Unauthorized`."""
    keys: ApiKeys = request.app.state.api_keys
    request.state.key_holder = keys.holder_of(request.headers)


async def require_admin(request: Request) -> None:
    """Let a request through only with the admin token. Raises `Forbidden` (there is none) or `Unauthorized`."""
    admin: AdminToken = request.app.state.admin_token
    admin.check(request.headers)
