"""Thread pools whose queues keep nothing of work that was cancelled."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def submit(pool: ThreadPoolExecutor, work: Callable[[], T]) -> Future[T]:
    """Run `work` in the pool. Once its future is cancelled, the queue refers to it no more, nor to its image.

    Raises `RuntimeError` if the pool is shut down.
    """
    held = [work]

    def run() -> T:
        return held.pop()()

    pending = pool.submit(run)
    pending.add_done_callback(lambda _: held.clear())
    return pending
