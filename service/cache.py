"""What was computed before: embeddings and answers by the hash of their image, never an image.

In the process an LRU of bounded size; behind it, where there is one, a Redis that several processes share.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

_REDIS_PAUSE_S = 2.0  # after a failure Redis is left alone for so long: it may be slow rather than gone
_REDIS_KEEPS_S = 24 * 3600
_ENTRY_OVERHEAD_BYTES = 200

log = logging.getLogger("wikiclip.cache")

T = TypeVar("T")


def cache_key(kind: str, data_sha256: str, fingerprint: str, parameters: str) -> str:
    """A key that changes with the image's bytes, the bundle and everything else that the value depends on."""
    digest = hashlib.sha256("\0".join((data_sha256, fingerprint, parameters)).encode()).hexdigest()
    return f"wikiclip:1:{kind}:{digest}"


class Lru:
    """Bytes by key, the least recently used dropped first, `max_bytes` in all. For one event loop."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, bytes] = OrderedDict()
        self.size_bytes = 0

    def get(self, key: str) -> bytes | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: bytes) -> None:
        self._drop(key)
        self._entries[key] = value
        self.size_bytes += _cost_bytes(key, value)
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        value = self._entries.pop(key, None)
        if value is not None:
            self.size_bytes -= _cost_bytes(key, value)


def _cost_bytes(key: str, value: bytes) -> int:
    return len(key) + len(value) + _ENTRY_OVERHEAD_BYTES


class Cache:
    """The LRU, and Redis behind it. Redis being slow, full or gone costs a request `redis_timeout_s` at most.

    `on_redis_error` is told of each failure. For one event loop; `close` ends the connections.
    """

    def __init__(
        self,
        max_bytes: int,
        redis_url: str | None = None,
        redis_timeout_s: float = 0.1,
        on_redis_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._redis_timeout_s = redis_timeout_s
        self._lru = Lru(max_bytes)
        self._on_redis_error = on_redis_error
        self._paused_until = 0.0
        self._redis: redis.asyncio.Redis | None = None
        if redis_url is not None:
            self._redis = redis.asyncio.Redis.from_url(
                redis_url,
                socket_timeout=redis_timeout_s,
                socket_connect_timeout=redis_timeout_s,
                retry=Retry(NoBackoff(), 0),
            )

    async def get(self, key: str) -> bytes | None:
        """The value of `key`, None where it is not known."""
        value = self._lru.get(key)
        if value is None and self._redis is not None:
            client = self._redis
            answer = await self._ask_redis(lambda: client.get(key))
            if isinstance(answer, bytes):
                value = answer
                self._lru.put(key, value)
        return value

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value; the oldest ones go where there is no room."""
        self._lru.put(key, value)
        if self._redis is not None:
            client = self._redis
            await self._ask_redis(lambda: client.set(key, value, ex=_REDIS_KEEPS_S))

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    async def _ask_redis(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        if time.monotonic() < self._paused_until:
            return None
        try:
            # The client's own timeouts are per read: this one bounds connecting, asking and answering together.
            answer = await asyncio.wait_for(ask(), self._redis_timeout_s)
        except (RedisError, OSError, TimeoutError) as error:
            if self._paused_until == 0.0:
                log.warning("Redis does not answer (%s): going on without it", error or type(error).__name__)
            self._paused_until = time.monotonic() + _REDIS_PAUSE_S
            self._on_redis_error()
            return None
        if self._paused_until:
            log.info("Redis answers again")
            self._paused_until = 0.0
        return answer


class SingleFlight(Generic[T]):
    """Equal work asked for at the same time is done once.

    The work goes on while anyone waits for it, and is cancelled when the last one has gone.
    """

    def __init__(self) -> None:
        self._flights: dict[str, tuple[asyncio.Task[T], list[None]]] = {}

    async def run(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives, or what the equal work that is under way gives. An error reaches all who wait."""
        if key not in self._flights:
            task = asyncio.ensure_future(_as_coroutine(work))
            self._flights[key] = (task, [])
            task.add_done_callback(lambda ended: self._land(key, ended))
        task, waiting = self._flights[key]
        waiting.append(None)
        try:
            return await asyncio.shield(task)
        finally:
            waiting.pop()
            if not waiting and not task.done():
                # A newcomer must start anew and not join work that is being cancelled.
                self._land(key, task)
                task.cancel()

    def _land(self, key: str, task: asyncio.Task[T]) -> None:
        if key in self._flights and self._flights[key][0] is task:
            del self._flights[key]


async def _as_coroutine(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
