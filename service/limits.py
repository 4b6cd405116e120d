"""Admission, which bounds the images in flight, and rate limits, which bound the images of each client."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from core.errors import TooManyRequests

if TYPE_CHECKING:
    from service.redis_link import RedisLink

_THROUGHPUT_WINDOW_S = 10.0
_MIN_BUSY_S = 0.5  # a throughput measured over less time means nothing
_DEADLINE_SHARE = 0.7  # leaves a margin for a throughput that varies
_MAX_RETRY_AFTER_S = 60

_PERIODS_S = {"second": 1.0, "minute": 60.0, "hour": 3600.0}
_RATE = re.compile(r"([1-9][0-9]{0,8})/(second|minute|hour)")
_MAX_BUCKETS = 50_000  # about 10 MB; beyond it, the least recently seen client's bucket is dropped

# One script, because Redis runs scripts atomically. The clock is Redis's own.
# A request larger than a full bucket takes the full bucket and leaves a debt, so no batch is refused forever.
_TAKE = """
local capacity, per_s, images = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local bucket = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = capacity
if bucket[1] then
  tokens = math.min(capacity, tonumber(bucket[1]) + math.max(0, now - tonumber(bucket[2])) * per_s)
end
local missing = math.min(images, capacity) - tokens
if missing > 0.000001 then
  return math.ceil(1000 * missing / per_s)
end
tokens = tokens - images
redis.call('HSET', KEYS[1], 'tokens', string.format('%.9f', tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(1000 * (capacity - tokens) / per_s) + 1000)
return 0
"""


class Admission:
    """Counts images from acceptance to answer, for single and batch requests alike. For one event loop.

    At most `limit` images are in flight. Fewer, if at the recent throughput more would not be answered within most of
    `deadline_s`, but always `minimum`. `on_refusal` is called with the number of images of each refused request.
    """

    def __init__(
        self,
        limit: int,
        *,
        minimum: int = 1,
        deadline_s: float = math.inf,
        on_refusal: Callable[[int], None] = lambda images: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight = 0
        self._limit = limit
        self._minimum = min(minimum, limit)
        self._deadline_s = deadline_s
        self._on_refusal = on_refusal
        self._now = now
        self._done: deque[tuple[float, int, float]] = deque()  # time, images, busy seconds since the previous entry
        self._done_images, self._done_busy_s = 0, 0.0  # the sums over _done
        self._busy_since = 0.0

    def refuse_if_full(self, images: int) -> None:
        """Raise `TooManyRequests` if there is no room for `images`."""
        room = self.room
        excess = self.in_flight + images - room
        if excess > 0:
            self._on_refusal(images)
            throughput = self._throughput()
            wait_s = 1 if throughput is None else min(max(math.ceil(excess / throughput), 1), _MAX_RETRY_AFTER_S)
            raise TooManyRequests(
                f"{self.in_flight} images are in flight and the current limit is {room}; retry in {wait_s} s",
                retry_after_s=wait_s,
            )

    @property
    def room(self) -> int:
        """Return how many images may be in flight now."""
        throughput = self._throughput()
        if throughput is None or not math.isfinite(self._deadline_s):
            return self._limit
        return min(self._limit, max(self._minimum, int(throughput * self._deadline_s * _DEADLINE_SHARE)))

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Count `images` as in flight during the block. Raises `TooManyRequests` if there is no room."""
        self.refuse_if_full(images)
        if self.in_flight == 0:
            self._busy_since = self._now()
        self.in_flight += images
        try:
            yield
        finally:
            now = self._now()
            self.in_flight -= images
            busy_s = now - self._busy_since
            self._done.append((now, images, busy_s))
            self._done_images += images
            self._done_busy_s += busy_s
            self._busy_since = now

    def _throughput(self) -> float | None:
        """Return the recent images per busy second, None if there were too few. Idle time does not count."""
        horizon = self._now() - _THROUGHPUT_WINDOW_S
        while self._done and self._done[0][0] < horizon:
            _, images, busy_s = self._done.popleft()
            self._done_images -= images
            self._done_busy_s -= busy_s
        if self._done_busy_s < _MIN_BUSY_S:
            return None
        return self._done_images / self._done_busy_s


class BodyBudget:
    """Bounds the bytes of request bodies that are in memory at the same time. For one event loop."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = self._free_bytes = limit_bytes

    def take(self, size_bytes: int) -> None:
        """Take bytes until `give_back`. Raises `TooManyRequests`."""
        if size_bytes > self._free_bytes:
            raise TooManyRequests(
                f"other request bodies take {self._limit_bytes - self._free_bytes} of {self._limit_bytes} bytes; "
                "retry in 1 s",
                retry_after_s=1,
            )
        self._free_bytes -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes


@dataclass(frozen=True, kw_only=True)
class Rate:
    """At most `images` at once, refilled evenly over `period_s`."""

    images: int
    period_s: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse N/second, N/minute or N/hour. Raises `ValueError`."""
        match = _RATE.fullmatch(text)
        if match is None:
            raise ValueError("give images per time as 10/second, 100/minute or 1000/hour")
        return cls(images=int(match[1]), period_s=_PERIODS_S[match[2]])

    @property
    def per_s(self) -> float:
        return self.images / self.period_s


class Buckets:
    """One token bucket for each client. For one event loop."""

    def __init__(
        self, rate: Rate, *, max_buckets: int = _MAX_BUCKETS, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._max_buckets = max_buckets
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (tokens, time of that count)

    def take(self, client: str, images: int) -> float:
        """Take tokens for `images` and return 0, or take none and return the seconds until there are enough."""
        now, capacity = self._now(), self._rate.images
        tokens, at = self._buckets.pop(client, (float(capacity), now))
        tokens = min(capacity, tokens + (now - at) * self._rate.per_s)
        missing = min(images, capacity) - tokens
        granted = missing <= 1e-6
        self._buckets[client] = (tokens - images if granted else tokens, now)
        if len(self._buckets) > self._max_buckets:
            self._buckets.popitem(last=False)
        return 0.0 if granted else missing / self._rate.per_s


class RateLimiter:
    """Limits images per client, in Redis while it answers, otherwise in the process."""

    def __init__(self, rate: Rate, redis: RedisLink | None = None) -> None:
        self._rate = rate
        self._redis = redis
        self._buckets = Buckets(rate)

    async def take(self, client: str, images: int) -> None:
        """Count `images` against `client`. Raises `TooManyRequests`."""
        wait_ms = None
        if self._redis is not None:
            # Redis sees only a hash of the key or address. A changed rate starts new buckets.
            name = hashlib.sha256(f"{client}\0{self._rate}".encode()).hexdigest()
            arguments = (f"wikiclip:1:rate:{name}", self._rate.images, repr(self._rate.per_s), images)
            wait_ms = await self._redis.ask(lambda redis: redis.eval(_TAKE, 1, *arguments))
        wait_s = self._buckets.take(client, images) if wait_ms is None else int(wait_ms) / 1000
        if wait_s > 0:
            retry_after_s = max(1, math.ceil(wait_s))
            raise TooManyRequests(
                f"the limit is {self._rate.images} images in {self._rate.period_s:.0f} s; retry in {retry_after_s} s",
                retry_after_s=retry_after_s,
            )

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()


def client_name(key_digest: str | None, address: str | None) -> str:
    """Return what a request is counted against: its API key, else its IPv4 address or the /64 of its IPv6 address."""
    if key_digest is not None:
        return f"key {key_digest}"
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return f"address {address}"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return f"address {ipaddress.ip_network((int(parsed) >> 64 << 64, 64))}"
    return f"address {getattr(parsed, 'ipv4_mapped', None) or parsed}"
