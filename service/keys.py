"""API keys: who may ask. Keys are known by their SHA-256 only and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from fastapi import Request
from starlette.datastructures import Headers

from core.errors import Unauthorized

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
        self._digests = tuple(bytes.fromhex(digest.removeprefix(DIGEST_PREFIX)) for digest in digests)

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
        # A list, not a generator: every key is compared, whichever fits.
        if not any([hmac.compare_digest(digest, known) for known in self._digests]):  # noqa: C419
            raise Unauthorized("the API key is not known here; check it, or ask the operator for one")
        return digest.hex()


def _presented(headers: Headers) -> bytes | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    return key.encode("latin-1") or None  # headers come decoded from it: these are the bytes that were sent


async def require_key(request: Request) -> None:
    """Let a request through only with a key, where there are keys; notes who holds it. Raises `Unauthorized`."""
    keys: ApiKeys = request.app.state.api_keys
    request.state.key_holder = keys.holder_of(request.headers)
