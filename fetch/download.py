"""Download files by URL: redirects, retries, limits of size and time, and a rate limit per host."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpcore
import httpx

from core.errors import FetchFailed, Forbidden, TooLarge
from core.network import PublicNetwork

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))
WORKERS = 16  # downloads at once, over all hosts


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """The first three limit each host; their defaults are those of Wikimedia's policy for robots.

    `timeout_s` is for one attempt with its redirects.
    """

    connections: int = 2
    requests_per_s: float = 5.0
    bits_per_s: float = 25e6
    max_bytes: int = 20 * 2**20
    timeout_s: float = 60.0
    retries: int = 5
    redirects: int = 5
    backoff_s: float = 1.0  # before the first retry, then doubled
    longest_wait_s: float = 600.0


class _Host:
    """Delays the requests to a host to keep its rate limits. Belongs to one event loop."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._connections = asyncio.Semaphore(limits.connections)
        self._next_start = 0.0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until the host accepts another request, and occupy one of its connections meanwhile."""
        async with self._connections:
            while (wait_s := self._next_start - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            self._next_start = time.monotonic() + 1 / self._limits.requests_per_s
            yield

    def count_bytes(self, count: int) -> None:
        """Delay the next request for as long as the bandwidth limit needs for `count` bytes."""
        self._next_start += 8 * count / self._limits.bits_per_s

    def pause(self, wait_s: float) -> None:
        """Delay every further request by `wait_s`."""
        self._next_start = max(self._next_start, time.monotonic() + wait_s)


class NotFetched(Exception):
    """A file that cannot be downloaded. The message says why."""


class _Transient(Exception):
    """A failure to retry. `wait_s` is the delay the host asked for, which the host's pace already includes."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Downloader:
    """Downloads files over persistent connections. Belongs to one event loop; close it with `aclose`."""

    def __init__(self, user_agent: str, limits: FetchLimits, *, accept: str, allow_private: bool) -> None:
        self._headers = [
            (b"User-Agent", user_agent.encode("ascii")),
            (b"Accept", accept.encode("ascii")),
            (b"Accept-Encoding", b"identity"),  # so that the size limit counts the file's own bytes
        ]
        self._limits = limits
        self._hosts: defaultdict[str, _Host] = defaultdict(lambda: _Host(limits))
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpcore.default_ssl_context(),
            network_backend=PublicNetwork(allow_private=allow_private),
            max_connections=WORKERS,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def get(self, url: str, refusal: Callable[[bytes], str | None] = lambda data: None) -> bytes:
        """Return the bytes of a file. Raises `NotFetched`.

        `refusal` says why an answer with status 200 is not the file, and the request is made again.
        """
        target = _target(url)
        for attempt in range(self._limits.retries + 1):
            try:
                async with asyncio.timeout(self._limits.timeout_s) as timeout:
                    data = await self._follow(target, timeout)
                if (reason := refusal(data)) is None:
                    return data
                raise _Transient(reason)
            except (_Transient, TimeoutError) as error:
                if attempt == self._limits.retries:
                    reason = str(error) or f"took over {self._limits.timeout_s:g} s"
                    raise NotFetched(f"{reason}, {attempt + 1} times") from error
                if getattr(error, "wait_s", None) is None:
                    # Random, so that requests that failed together are not retried together.
                    await asyncio.sleep(self._limits.backoff_s * 2**attempt * random.uniform(0.5, 1))
            except (Forbidden, TooLarge) as error:
                raise NotFetched(error.detail) from error
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, target: httpx.URL, timeout: asyncio.Timeout) -> bytes:
        for _ in range(self._limits.redirects + 1):
            timeout.reschedule(None)  # waiting for the rate limit does not count
            async with self._hosts[target.host].turn():
                timeout.reschedule(asyncio.get_running_loop().time() + self._limits.timeout_s)
                response = await self._request(target)
            if isinstance(response, bytes):
                return response
            target = response
        raise NotFetched(f"redirects more than {self._limits.redirects} times")

    async def _request(self, target: httpx.URL) -> bytes | httpx.URL:
        """Return the body, or the target of a redirect."""
        url = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        host = target.netloc
        try:
            async with self._pool.stream("GET", url, headers=[(b"Host", host), *self._headers]) as response:
                headers = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in headers:
                    return _target(headers[b"location"].decode("latin-1"), target)
                if response.status in _TRANSIENT:
                    raise self._refused(self._hosts[target.host], response.status, headers.get(b"retry-after"))
                if response.status != 200:
                    raise NotFetched(f"the server answered {response.status}")
                return await self._body(self._hosts[target.host], response)
        except FetchFailed as error:  # the name has no address; DNS failures may be temporary
            raise _Transient(error.detail.partition(";")[0]) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _Transient(f"the connection failed ({type(error).__name__})") from error

    async def _body(self, host: _Host, response: httpcore.Response) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in response.aiter_stream():
                size += len(chunk)
                if size > self._limits.max_bytes:
                    raise TooLarge(f"is over {self._limits.max_bytes} bytes")
                chunks.append(chunk)
        finally:
            host.count_bytes(size)
        return b"".join(chunks)

    def _refused(self, host: _Host, status: int, retry_after: bytes | None) -> Exception:
        wait_s = None if retry_after is None else _seconds(retry_after.decode("latin-1"))
        if wait_s is None:
            return _Transient(f"the server answered {status}")
        if wait_s > self._limits.longest_wait_s:
            return NotFetched(f"the server answered {status} and asks to wait {wait_s:.0f} s; try again later")
        host.pause(wait_s)
        return _Transient(f"the server answered {status}", wait_s)


def _target(url: str, base: httpx.URL | None = None) -> httpx.URL:
    prefix = "is not" if base is None else "redirects to something that is not"
    try:
        target = httpx.URL(url) if base is None else base.join(url)
        host, port = target.host, target.port or 80  # `host` raises for some malformed names
    except (httpx.InvalidURL, ValueError) as error:
        raise NotFetched(f"{prefix} a URL") from error
    if target.scheme not in ("http", "https") or not host or target.userinfo or not 0 < port < 2**16:
        raise NotFetched(f"{prefix} an http or https URL")
    return target


def _seconds(retry_after: str) -> float | None:
    """Parse a `Retry-After` header, seconds or a date. Returns None if it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
