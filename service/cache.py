"""What was computed before: embeddings and answers by the hash of their image, never an image.

In the process an LRU of bounded size; behind it, where there is one, a Redis that several processes share.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from service.redis_link import RedisLink

_REDIS_KEEPS_S = 24 * 3600
_ENTRY_OVERHEAD_BYTES = 200

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
        self._lru = Lru(max_bytes)
        self._redis = None if redis_url is None else RedisLink(redis_url, redis_timeout_s, on_redis_error)

    async def get(self, key: str) -> bytes | None:
        """The value of `key`, None where it is not known."""
        value = self._lru.get(key)
        if value is None and self._redis is not None:
            answer = await self._redis.ask(lambda redis: redis.get(key))
            if isinstance(answer, bytes):
                value = answer
                self._lru.put(key, value)
        return value

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value; the oldest ones go where there is no room."""
        self._lru.put(key, value)
        if self._redis is not None:
            await self._redis.ask(lambda redis: redis.set(key, value, ex=_REDIS_KEEPS_S))

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()


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
            del task  # it knows of an error, which knows of this frame

    def _land(self, key: str, task: asyncio.Task[T]) -> None:
        if key in self._flights and self._flights[key][0] is task:
            del self._flights[key]


async def _as_coroutine(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
