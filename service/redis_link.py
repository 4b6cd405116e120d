"""A Redis that may be slow, full or gone: asking costs its timeout at most, after a failure nothing for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

_PAUSE_S = 2.0  # after a failure Redis is left alone for so long: it may be slow rather than gone

log = logging.getLogger("wikiclip.redis")

T = TypeVar("T")


class RedisLink:
    """`on_error` is told of each failure. For one event loop; `close` ends the connections."""

    def __init__(self, url: str, timeout_s: float, on_error: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._on_error = on_error
        self._paused_until = 0.0
        self._client = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )

    async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T | None:
        """What `question`, given a client, gives; None where Redis does not answer in time."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            # The client's own timeouts are per read: this one bounds connecting, asking and answering together.
            answer = await asyncio.wait_for(question(self._client), self._timeout_s)
        except (RedisError, OSError, TimeoutError) as error:
            if self._paused_until == 0.0:
                log.warning("Redis does not answer (%s): going on without it", error or type(error).__name__)
            self._paused_until = time.monotonic() + _PAUSE_S
            self._on_error()
            return None
        if self._paused_until:
            log.info("Redis answers again")
            self._paused_until = 0.0
        return answer

    async def close(self) -> None:
        await self._client.aclose()
