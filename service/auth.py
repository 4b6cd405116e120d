"""API keys and the admin token. Both are stored as SHA-256 digests and compared in constant time."""

import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request

from core.errors import Forbidden, Unauthorized

_PREFIX = "sha256:"
_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


def digest_of(key: str) -> str:
    """Return `sha256:` and the digest of a key in hex. A key that already has this form stays as it is.

    Raises `ValueError`, without quoting the key.
    """
    if not key.startswith(_PREFIX):
        return _digest(key.encode())
    if not _DIGEST.fullmatch(key):
        raise ValueError("a key that begins with sha256: must continue with the 64 hex digits of the key's SHA-256")
    return key.lower()


async def require_key(request: Request) -> None:
    """Check a request's API key and store its digest in `request.state.key_digest`, None if the service needs no key.

    Raises `Unauthorized`.
    """
    known: Sequence[str] = request.app.state.api_keys
    request.state.key_digest = digest = _digest_in(request.headers) if known else None
    if not known:
        return
    if digest is None:
        raise Unauthorized("an API key is needed; send it as Authorization: Bearer KEY or as X-API-Key: KEY")
    # A list, not a generator: every digest is compared, so the time does not depend on which one matches.
    if not any([hmac.compare_digest(digest, each) for each in known]):  # noqa: C419
        raise Unauthorized("the API key is unknown; check it, or ask the operator for one")


async def require_admin(request: Request) -> None:
    """Raise `Forbidden` if the service has no admin token, `Unauthorized` if the request's token is not it."""
    known: str | None = request.app.state.admin_token
    if known is None:
        raise Forbidden("changes are off: the service has no admin token; set WIKICLIP_ADMIN_TOKEN to allow them")
    digest = _digest_in(request.headers)
    if digest is None:
        raise Unauthorized("the admin token is needed; send it as Authorization: Bearer TOKEN")
    if not hmac.compare_digest(digest, known):
        raise Unauthorized("this is not the admin token; check it, or ask the operator for it")


def _digest_in(headers: Headers) -> str | None:
    """Return the digest of a request's key or token, None if it has neither."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return _digest(key.encode("latin-1")) if key else None  # Starlette decodes headers as latin-1


def _digest(key: bytes) -> str:
    return _PREFIX + hashlib.sha256(key).hexdigest()
