"""One image by URL: redirects followed, passing failures tried again, within limits of size and time."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpcore
import httpx

from core.errors import FetchFailed, Forbidden, TooLarge, UndecodableImage
from core.network import PublicNetwork
from fetch.pace import Pace
from imaging import decode, sniff

_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))


@dataclass(frozen=True, kw_only=True)
class DownloadLimits:
    """`timeout_s` is for one attempt, redirects included. An image in vain is asked for `retries` times more."""

    max_bytes: int = 20 * 2**20
    max_pixels: int = 200_000_000
    timeout_s: float = 60.0
    retries: int = 5
    redirects: int = 5
    backoff_s: float = 1.0  # before the first retry, then doubled
    longest_wait_s: float = 600.0


class NotFetched(Exception):
    """An image that is not to be had; its message says why."""


class _Passing(Exception):
    """A failure that may be over after a while: `wait_s` where the host said when."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, kw_only=True)
class _Redirect:
    url: httpx.URL


class Downloader:
    """Downloads images over connections that are kept open. Belongs to one event loop; close it with `aclose`."""

    def __init__(
        self, *, user_agent: str, pace: Pace, limits: DownloadLimits, network: PublicNetwork, connections: int
    ) -> None:
        self._headers = [
            (b"User-Agent", user_agent.encode("ascii")),
            (b"Accept", b"image/*"),
            (b"Accept-Encoding", b"identity"),  # so that bytes counted are bytes had
        ]
        self._pace = pace
        self._limits = limits
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpcore.default_ssl_context(), network_backend=network, max_connections=connections
        )

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def get(self, url: str) -> tuple[bytes, str]:
        """An image's bytes, which decode, and its media type by content. Raises `NotFetched`."""
        target = _target(url)
        for attempt in range(self._limits.retries + 1):
            try:
                async with asyncio.timeout(self._limits.timeout_s) as within:
                    data = await self._follow(target, within)
                return data, await asyncio.to_thread(self._checked, data)
            except (_Passing, TimeoutError) as error:
                passing = error if isinstance(error, _Passing) else _Passing(f"took over {self._limits.timeout_s:g} s")
                if attempt == self._limits.retries:
                    raise NotFetched(f"{passing}, {attempt + 1} times") from error
                if passing.wait_s is None:
                    # Spread, so that what failed together does not come back together.
                    await asyncio.sleep(self._limits.backoff_s * 2**attempt * random.uniform(0.5, 1))
            except (Forbidden, TooLarge) as error:
                raise NotFetched(error.detail) from error
        raise AssertionError("the last attempt returns or raises")

    async def _follow(self, target: httpx.URL, within: asyncio.Timeout) -> bytes:
        for _ in range(self._limits.redirects + 1):
            within.reschedule(None)  # waiting for one's turn is no fault of the host
            async with self._pace.turn(target.host):
                within.reschedule(asyncio.get_running_loop().time() + self._limits.timeout_s)
                answer = await self._ask(target)
            if isinstance(answer, bytes):
                return answer
            target = answer.url
        raise NotFetched(f"redirects more than {self._limits.redirects} times")

    async def _ask(self, target: httpx.URL) -> bytes | _Redirect:
        url = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        host = target.netloc
        try:
            async with self._pool.stream("GET", url, headers=[(b"Host", host), *self._headers]) as response:
                told = {name.lower(): value for name, value in response.headers}
                if response.status in _REDIRECTS and b"location" in told:
                    return _Redirect(url=_target(told[b"location"].decode("latin-1"), target))
                if response.status in _PASSING:
                    raise self._refused(target.host, response.status, told.get(b"retry-after"))
                if response.status != 200:
                    raise NotFetched(f"the server answered {response.status}")
                return await self._body(target.host, response)
        except FetchFailed as error:  # no address: names are not always to be had either
            raise _Passing(error.detail.partition(";")[0]) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _Passing(f"the connection failed ({type(error).__name__})") from error

    async def _body(self, host: str, response: httpcore.Response) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async for chunk in response.aiter_stream():
                size += len(chunk)
                if size > self._limits.max_bytes:
                    raise TooLarge(f"is over {self._limits.max_bytes} bytes")
                chunks.append(chunk)
        finally:
            self._pace.took(host, size)
        return b"".join(chunks)

    def _refused(self, host: str, status: int, retry_after: bytes | None) -> Exception:
        wait_s = None if retry_after is None else _seconds(retry_after.decode("latin-1"))
        if wait_s is None:
            return _Passing(f"the server answered {status}")
        if wait_s > self._limits.longest_wait_s:
            return NotFetched(f"the server answered {status} and asks to wait {wait_s:.0f} s; try again later")
        self._pace.hold_off(host, wait_s)
        return _Passing(f"the server answered {status}", wait_s)

    def _checked(self, data: bytes) -> str:
        """The media type of bytes that decode. Raises `NotFetched`."""
        try:
            decode(data, max_pixels=self._limits.max_pixels, target_px=224)
        except (UndecodableImage, TooLarge) as error:
            raise NotFetched(error.detail.partition(";")[0]) from error
        kind = sniff(data)
        assert kind is not None, "what decodes has a type"
        return kind


def _target(url: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        target = httpx.URL(url) if base is None else base.join(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise NotFetched("is no URL" if base is None else "redirects to what is no URL") from error
    if target.scheme not in ("http", "https") or not target.host or target.userinfo:
        raise NotFetched("is no http or https URL" if base is None else "redirects to what is no http or https URL")
    return target


def _seconds(retry_after: str) -> float | None:
    """What `Retry-After` says, seconds or a date; None if it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)
