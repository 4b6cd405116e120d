"""How often one host is asked: never more than it is fair to, and not before it wants to be asked again."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PaceLimits:
    """What every host is spared. The defaults are what Wikimedia asks of robots that read its media."""

    connections: int = 2
    requests_per_s: float = 5.0
    bits_per_s: float = 25e6


class _Host:
    def __init__(self, limits: PaceLimits) -> None:
        self.places = asyncio.Semaphore(limits.connections)
        self.next_start = 0.0


class Pace:
    """The turns of all hosts. Belongs to one event loop."""

    def __init__(self, limits: PaceLimits) -> None:
        self._limits = limits
        self._hosts: defaultdict[str, _Host] = defaultdict(lambda: _Host(limits))

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait until the host may be asked, and keep one of its places meanwhile."""
        state = self._hosts[host]
        async with state.places:
            while (wait_s := state.next_start - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            state.next_start = time.monotonic() + 1 / self._limits.requests_per_s
            yield

    def took(self, host: str, count: int) -> None:
        """Bytes that a host sent: its next turn comes so much later that the rate stays within its limit."""
        self._hosts[host].next_start += 8 * count / self._limits.bits_per_s

    def hold_off(self, host: str, wait_s: float) -> None:
        """Leave a host alone for a while, all requests to it."""
        state = self._hosts[host]
        state.next_start = max(state.next_start, time.monotonic() + wait_s)
