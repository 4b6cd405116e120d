"""The link to a Redis that may be slow, full or down. Importing redis is slow, so only a service with Redis does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

_PAUSE_S = 2.0  # a slow Redis costs one timeout in this time, not one for each request

log = logging.getLogger("wikiclip.redis")

T = TypeVar("T")


class RedisLink:
    """A Redis that may be slow, full or down. A call takes at most `timeout_s`. After a failure, calls pause for 2 s,
    but not if Redis answers that it refuses the command.

    `on_error` is called after each failure. For one event loop. Close it when done.
    """

    def __init__(self, url: str, timeout_s: float, on_error: Callable[[], None] = lambda: None) -> None:
        self._timeout_s = timeout_s
        self._on_error = on_error
        self._paused_until = 0.0
        self._refused = False
        self._client = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )

    async def ask(self, call: Callable[[Any], Awaitable[T]]) -> T | None:
        """Return what `call` returns, given a client, or None if Redis does not answer in time."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            # The client's own timeouts are for each read and write. This one is for all of them together.
            answer = await asyncio.wait_for(call(self._client), self._timeout_s)
        except ResponseError as error:  # of this command only, for example because another program uses its key
            if not self._refused:
                log.warning("Redis refuses a command (%s): continuing without it", error)
            self._refused = True
            self._on_error()
            return None
        except (RedisError, OSError, TimeoutError) as error:
            if self._paused_until == 0.0:
                log.warning("Redis does not answer (%s): continuing without it", error or type(error).__name__)
            self._paused_until = time.monotonic() + _PAUSE_S
            self._on_error()
            return None
        if self._paused_until:
            log.info("Redis answers again")
            self._paused_until = 0.0
        return answer

    async def close(self) -> None:
        await self._client.aclose()
