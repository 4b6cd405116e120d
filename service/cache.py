"""A cache of embeddings and answers by the hash of their image. It never holds an image.

Each process has an LRU cache of bounded size. With Redis, processes share a second one.

Shapes: D embedding width.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from pydantic import ValidationError

from core.arrays import Float32Array
from wikiclip.answers import Box, Recognition, RecognizeOptions

if TYPE_CHECKING:
    from service.loaded_bundle import BundleView
    from service.redis_link import RedisLink

_MAX_NORM = 1e6  # of a cached embedding; most encoders give about 1
_REDIS_TTL_S = 24 * 3600
_ENTRY_OVERHEAD_BYTES = 200

log = logging.getLogger("wikiclip.redis")

T = TypeVar("T")


def cache_key(kind: str, data_sha256: str, fingerprint: str, parameters: str) -> str:
    """Return the key of a value that depends on an image's bytes, a bundle or encoder, and parameters."""
    digest = hashlib.sha256("\0".join((data_sha256, fingerprint, parameters)).encode()).hexdigest()
    return f"wikiclip:1:{kind}:{digest}"


class Lru:
    """Bytes by key, at most `max_bytes` in all. The least recently used are dropped first. For one event loop."""

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
    """The LRU cache, and Redis behind it. A Redis that is slow, full or down delays a request by `redis_timeout_s`.

    A damaged embedding [D] or answer counts as missing.

    `on_redis_error` is called after each failure. For one event loop. Close it when done.
    """

    def __init__(
        self,
        max_bytes: int,
        redis_url: str | None = None,
        redis_timeout_s: float = 0.1,
        on_redis_error: Callable[[], None] = lambda: None,
    ) -> None:
        self._lru = Lru(max_bytes)
        self._redis: RedisLink | None = None
        if redis_url is not None:
            from service.redis_link import RedisLink

            self._redis = RedisLink(redis_url, redis_timeout_s, on_redis_error)

    async def get(self, key: str) -> bytes | None:
        """Return the value of a key, None if it is not cached."""
        value = self._lru.get(key)
        if value is None and self._redis is not None:
            answer = await self._redis.ask(lambda redis: redis.get(key))
            if isinstance(answer, bytes):
                value = answer
                self._lru.put(key, value)
        return value

    async def put(self, key: str, value: bytes) -> None:
        """Cache a value."""
        self._lru.put(key, value)
        if self._redis is not None:
            await self._redis.ask(lambda redis: redis.set(key, value, ex=_REDIS_TTL_S))

    async def get_embedding(self, key: str, dim: int) -> Float32Array | None:
        value = await self.get(key)
        if value is None or len(value) != 4 * dim:
            return None
        embedding_D = np.frombuffer(value, "<f4").astype(np.float32)
        norm = np.linalg.norm(embedding_D.astype(np.float64))
        return embedding_D if 0 < norm < _MAX_NORM else None  # false for NaN

    async def put_embedding(self, key: str, embedding_D: Float32Array) -> None:
        await self.put(key, embedding_D.astype("<f4").tobytes())

    async def get_answer(self, key: str, label: str) -> Recognition | None:
        """Return an answer of the bundle `label`, as `put_answer` stores it."""
        value = await self.get(key)
        if value is None:
            return None
        try:
            answer = Recognition.model_validate_json(value)
            if (answer.bundle, answer.cached, answer.timings_ms) == (label, True, {}):
                return answer
        except ValidationError:
            pass
        log.warning("an answer in the cache is damaged and is computed again")
        return None

    async def put_answer(self, key: str, recognition: Recognition) -> None:
        stored = recognition.model_copy(update={"cached": True, "timings_ms": {}})
        await self.put(key, stored.model_dump_json().encode())

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.close()


def embedding_key(image_sha256: str, box: Box | None, view: BundleView) -> str:
    """Return the key of an embedding. Another bundle with the same encoder can use it, too."""
    return cache_key("embedding", image_sha256, view.loaded.encoder_hash, repr(box))


def answer_key(images_sha256: Sequence[str], options: RecognizeOptions, view: BundleView) -> str:
    """Return the key of the answer to a set of images, given by their sorted hashes."""
    # Services of one bundle that share a Redis may run encoders of different precisions.
    return cache_key("answer", " ".join(images_sha256), f"{view.label} {view.loaded.encoder_hash}", repr(options))


class SingleFlight(Generic[T]):
    """Runs equal work once for all callers that need it at the same time.

    The work is cancelled when its last caller is.
    """

    def __init__(self) -> None:
        self._flights: dict[str, tuple[asyncio.Task[T], list[None]]] = {}

    async def run(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `work`, or of the work that is running for this key. All callers get its error."""
        if key not in self._flights:
            task = asyncio.create_task(work())
            self._flights[key] = (task, [])
            task.add_done_callback(lambda ended: self._remove(key, ended))
        task, callers = self._flights[key]
        callers.append(None)
        try:
            return await asyncio.shield(task)
        finally:
            callers.pop()
            if not callers and not task.done():
                # Removed at once, so that a new caller does not join work that is being cancelled.
                self._remove(key, task)
                task.cancel()
            del task  # its error refers to this frame: a reference cycle

    def _remove(self, key: str, task: asyncio.Task[T]) -> None:
        if key in self._flights and self._flights[key][0] is task:
            del self._flights[key]
