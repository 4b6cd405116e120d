"""Stages that work at the same time, each a bounded step ahead of the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Generator[Item], depth: int) -> Generator[Item]:
    """Yield `items` while a thread makes the next `depth` of them. What they raise is raised here, in its place."""
    pending: deque[Future[Item | None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        try:
            for _ in range(depth):
                pending.append(pool.submit(next, items, None))
            while (item := pending.popleft().result()) is not None:
                pending.append(pool.submit(next, items, None))
                yield item
        finally:
            for future in pending:
                future.cancel()
            pool.submit(items.close).result()


class StageTimes:
    """Seconds that each stage took, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def next(self, stage: str, items: Iterator[Item]) -> Item | None:
        """The next of some items, None at their end; waiting for it counts as `stage`."""
        with self.measure(stage):
            return next(items, None)
