"""Fetch images by URL, from allowed hosts only, so that requests cannot reach internal services (SSRF).

Every URL, redirects included, goes through the same checks: scheme, port and host. Its name is resolved once, all its
addresses must be public, and the connection uses one of them. A second look-up cannot lead elsewhere.
"""

import asyncio
import re
import ssl
from collections.abc import Sequence
from functools import cached_property
from urllib.parse import urljoin, urlsplit

import httpcore

from core.errors import BadRequest, FetchFailed, Forbidden, TooLarge
from core.network import PublicNetwork, Resolver, resolve

MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_URL_CHARACTERS = 4096
_REQUEST_HEADERS: dict[bytes | str, bytes | str] = {
    "User-Agent": "wikiclip-serve",
    "Accept": "image/*",
    "Accept-Encoding": "identity",  # a small compressed body could grow past max_bytes
}
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")


def host_pattern(text: str) -> str:
    """Return an entry of the allow-list in lower case: a host, or `*.` and a domain. Raises `ValueError`."""
    pattern = text.lower()
    if not _HOST.fullmatch(pattern.removeprefix("*.")):
        raise ValueError("give hosts as images.example.org or *.example.org, without scheme, port or path")
    return pattern


def host_allowed(host: str, patterns: Sequence[str]) -> bool:
    """Return whether a host matches the allow-list. `*.example.org` matches subdomains, not example.org itself."""
    return _HOST.fullmatch(host) is not None and any(
        host.endswith(pattern[1:]) and host != pattern[1:] if pattern.startswith("*.") else host == pattern
        for pattern in patterns
    )


class ImageFetcher:
    """Fetches images of at most `max_bytes` from the hosts in `allowlist`, each within `timeout_s`.

    `resolver` and `network` replace DNS and TCP in tests.
    """

    def __init__(
        self,
        allowlist: Sequence[str],
        *,
        max_bytes: int,
        timeout_s: float,
        resolver: Resolver = resolve,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._allowlist = tuple(allowlist)
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._network = PublicNetwork(network, resolver=resolver)

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        return httpcore.default_ssl_context()  # slow: it reads all root certificates

    async def fetch(self, url: str) -> bytes:
        """Return the bytes of an image.

        Raises `BadRequest` (malformed URL), `Forbidden` (not allowed), `TooLarge`, or `FetchFailed` (the other server
        does not deliver).
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise FetchFailed(
                f"the image did not arrive within {self._timeout_s:g} s; try again, or send the image itself"
            ) from None

    async def _follow(self, url: str) -> bytes:
        checked = self._check(url)
        for _ in range(MAX_REDIRECTS + 1):
            result = await self._get(checked)
            if isinstance(result, bytes):
                return result
            try:
                url = urljoin(url, result)
                checked = self._check(url)
            except (ValueError, BadRequest):
                raise FetchFailed("the URL redirects to a malformed URL; check it") from None
        raise FetchFailed(f"the URL redirects more than {MAX_REDIRECTS} times; send the final URL of the image")

    def _check(self, url: str) -> httpcore.URL:
        """Parse a URL and apply the checks that need no network."""
        if not self._allowlist:
            raise Forbidden("URL input is disabled; send the image itself")
        try:
            # Refuse characters that URL parsers disagree about: one could check another host than the one connected to.
            if len(url) > _MAX_URL_CHARACTERS or not url.isascii() or any(ch <= " " or ch in "\\\x7f" for ch in url):
                raise ValueError
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise BadRequest(
                f"image.url is malformed; send an absolute URL of at most {_MAX_URL_CHARACTERS} characters, with all "
                "but plain ASCII percent-encoded"
            ) from None
        if parts.scheme not in _PORTS:
            raise Forbidden("only http and https URLs are fetched; send the image itself")
        if parts.username is not None or parts.password is not None:
            raise Forbidden("URLs with a user name or password are not fetched; remove them")
        port = _PORTS[parts.scheme] if port is None else port
        if port not in _PORTS.values():
            raise Forbidden("only ports 80 and 443 are allowed; send the image itself")
        host = (parts.hostname or "").lower()
        if not host_allowed(host, self._allowlist):
            raise Forbidden("the URL's host is not on this service's allow-list; send the image itself")
        path_and_query = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return httpcore.URL(scheme=parts.scheme, host=host, port=port, target=path_and_query.encode("ascii"))

    async def _get(self, url: httpcore.URL) -> bytes | str:
        """Return the image as bytes, or the location of a redirect as str."""
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._ssl_context if url.scheme == b"https" else None,
            network_backend=self._network,
            max_connections=1,
        )
        try:
            async with pool, pool.stream("GET", url, headers=_REQUEST_HEADERS) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in headers:
                    return headers[b"location"].decode("latin-1")
                if response.status != 200:
                    raise FetchFailed(f"the URL's server answered {response.status}; check the URL")
                if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                    raise FetchFailed("the URL's server sent the image compressed; send the image itself")
                image = bytearray()
                async for chunk in response.aiter_stream():
                    image += chunk
                    if len(image) > self._max_bytes:
                        reason = f"the image behind the URL is over {self._max_bytes} bytes; choose a smaller one"
                        raise TooLarge(reason)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise FetchFailed("the URL's server could not be reached; check the URL") from error
        if not image:
            raise FetchFailed("the URL's server sent an empty response; check the URL")
        return bytes(image)
