"""API keys and the admin token. Both are stored as SHA-256 digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request

from core.errors import Forbidden, Unauthorized

DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


def digest_of(key: str) -> str:
    """Return `sha256:` and the digest of a key in hex. A key that already has this form stays as it is.

    Raises `ValueError`, without quoting the key.
    """
    if not key.startswith(DIGEST_PREFIX):
        return DIGEST_PREFIX + hashlib.sha256(key.encode()).hexdigest()
    if not _DIGEST.fullmatch(key):
        raise ValueError("a key that begins with sha256: must continue with the 64 hex digits of the key's SHA-256")
    return key.lower()


class ApiKeys:
    """The API keys of a service, as digests. Without any, every request is accepted."""

    def __init__(self, digests: Sequence[str]) -> None:
        self._digests = _as_bytes(digests)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, headers: Headers) -> str | None:
        """Return the digest of the request's key, None if the service needs no key. Raises `Unauthorized`."""
        if not self._digests:
            return None
        digest = _digest_in(headers)
        if digest is None:
            raise Unauthorized("an API key is needed; send it as Authorization: Bearer KEY or as X-API-Key: KEY")
        if not _is_any_of(digest, self._digests):
            raise Unauthorized("the API key is unknown; check it, or ask the operator for one")
        return digest.hex()


class AdminToken:
    """The token that allows changes to what is served, as a digest. Without one, no change is allowed."""

    def __init__(self, digest: str | None) -> None:
        self._digests = _as_bytes(() if digest is None else (digest,))

    def check(self, headers: Headers) -> None:
        """Raise `Forbidden` if the service has no admin token, `Unauthorized` if the request's token is not it."""
        if not self._digests:
            raise Forbidden("changes are off: the service has no admin token; set WIKICLIP_ADMIN_TOKEN to allow them")
        digest = _digest_in(headers)
        if digest is None:
            raise Unauthorized("the admin token is needed; send it as Authorization: Bearer TOKEN")
        if not _is_any_of(digest, self._digests):
            raise Unauthorized("this is not the admin token; check it, or ask the operator for it")


async def require_key(request: Request) -> None:
    """Check a request's API key and store its digest in `request.state.key_digest`. Raises `Unauthorized`."""
    keys: ApiKeys = request.app.state.api_keys
    request.state.key_digest = keys.check(request.headers)


async def require_admin(request: Request) -> None:
    """Check a request's admin token. Raises `Forbidden` or `Unauthorized`."""
    admin: AdminToken = request.app.state.admin_token
    admin.check(request.headers)


def _as_bytes(digests: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(digest.removeprefix(DIGEST_PREFIX)) for digest in digests)


def _is_any_of(digest: bytes, known: Sequence[bytes]) -> bool:
    # A list, not a generator: every digest is compared, so the time does not depend on which one matches.
    return any([hmac.compare_digest(digest, each) for each in known])  # noqa: C419


def _digest_in(headers: Headers) -> bytes | None:
    """Return the digest of a request's key or token, None if it has neither."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return hashlib.sha256(key.encode("latin-1")).digest() if key else None  # Starlette decodes headers as latin-1
