"""Images by URL, from hosts on a list only: a request may not make the service reach anything else.

Each step, redirects included, is checked anew: scheme, port, host; the name is resolved once, every address it has is
checked, and the connection goes to one of those, so that a second look-up cannot lead elsewhere.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from core.errors import BadRequest, FetchFailed, Forbidden, TooLarge
from core.network import PublicNetwork, Resolver, resolve
from service.addresses import host_allowed

MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_URL_CHARACTERS = 4096


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A URL that passed the checks which need no network."""

    url: str
    scheme: str
    host: str
    port: int
    path_and_query: str


class Fetcher:
    """Fetches images from the hosts in `allowlist`, of at most `max_bytes`, within `timeout_s` in all.

    `resolver` and `network` say how names are looked up and connections made.
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
        return httpcore.default_ssl_context()  # reads all certificates: once, and only where they are needed

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a URL.

        Raises `BadRequest` if it is no URL, `Forbidden` if it may not be fetched, `TooLarge`, and `FetchFailed` if the
        other server does not give it.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._follow(url)
        except TimeoutError:
            raise FetchFailed(
                f"the image did not arrive within {self._timeout_s:g} s; try again, or send the image itself"
            ) from None

    async def _follow(self, url: str) -> bytes:
        target = self._target(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(target)
            if isinstance(answer, bytes):
                return answer
            try:
                target = self._target(urljoin(target.url, answer.location))
            except (ValueError, BadRequest):
                raise FetchFailed("the URL redirects to what is no URL; check the URL") from None
        raise FetchFailed(f"the URL redirects more than {MAX_REDIRECTS} times; give the address of the image itself")

    def _target(self, url: str) -> _Target:
        if not self._allowlist:
            raise Forbidden("URL input is disabled; send the image itself")
        parts, port = _split(url)
        if parts.scheme not in _PORTS:
            raise Forbidden("only http and https URLs are fetched; send the image itself")
        if parts.username is not None or parts.password is not None:
            raise Forbidden("URLs with a user name or password are not fetched; leave them out")
        port = _PORTS[parts.scheme] if port is None else port
        if port not in _PORTS.values():
            raise Forbidden("only ports 80 and 443 are fetched from; send the image itself")
        host = (parts.hostname or "").lower()
        if not host_allowed(host, self._allowlist):
            raise Forbidden("the host of the URL is not on the list of this service; send the image itself")
        path_and_query = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(url=url, scheme=parts.scheme, host=host, port=port, path_and_query=path_and_query)

    async def _get(self, target: _Target) -> bytes | _Redirect:
        default_port = target.port == _PORTS[target.scheme]
        headers: dict[bytes | str, bytes | str] = {
            "Host": target.host if default_port else f"{target.host}:{target.port}",
            "User-Agent": "wikiclip-serve",
            "Accept": "image/*",
            "Accept-Encoding": "identity",  # so that bytes counted are bytes had
        }
        pool = httpcore.AsyncConnectionPool(
            ssl_context=self._ssl_context if target.scheme == "https" else None,
            network_backend=self._network,
            max_connections=1,
        )
        url = httpcore.URL(
            scheme=target.scheme, host=target.host, port=target.port, target=target.path_and_query.encode("ascii")
        )
        try:
            async with pool, pool.stream("GET", url, headers=headers) as response:
                told = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in told:
                    return _Redirect(location=told[b"location"].decode("latin-1"))
                if response.status != 200:
                    raise FetchFailed(f"the server of the URL answered {response.status}; check the URL")
                if told.get(b"content-encoding", b"identity").lower() != b"identity":
                    raise FetchFailed("the server of the URL sends it compressed; send the image itself")
                return await self._read(response)
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise FetchFailed("the server of the URL did not answer properly; check the URL") from error

    async def _read(self, response: httpcore.Response) -> bytes:
        chunks: list[bytes] = []
        size_bytes = 0
        async for chunk in response.aiter_stream():
            size_bytes += len(chunk)
            if size_bytes > self._max_bytes:
                raise TooLarge(f"the image behind the URL is over {self._max_bytes} bytes; give a smaller one")
            chunks.append(chunk)
        if size_bytes == 0:
            raise FetchFailed("the server of the URL gave an empty answer; check the URL")
        return b"".join(chunks)


@dataclass(frozen=True, kw_only=True)
class _Redirect:
    location: str


def _split(url: str) -> tuple[SplitResult, int | None]:
    # What parsers disagree about is refused: they would check one host and reach another.
    if len(url) > _MAX_URL_CHARACTERS or not url.isascii() or any(ch <= " " or ch in "\\\x7f" for ch in url):
        raise BadRequest("image.url is malformed; percent-encode what is not plain ASCII")
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError:
        raise BadRequest("image.url is malformed; give a whole one, as https://example.org/a.jpg") from None
