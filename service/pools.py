"""Thread pools that drop cancelled work at once, and that know how long they have been stuck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pool(ThreadPoolExecutor):
    """An executor whose queue no longer refers to work, nor to its image, once the work's future is cancelled."""

    def __init__(self, threads: int, name: str) -> None:
        super().__init__(threads, thread_name_prefix=name)
        self._threads_max = threads
        self._started_at: dict[int, float] = {}  # of the work in progress, by thread

    @property
    def stuck_s(self) -> float:
        """Return for how long every thread has been at the same work, 0 while a thread is free."""
        started_at = list(self._started_at.values())
        return time.monotonic() - max(started_at) if len(started_at) == self._threads_max else 0.0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function. Raises `RuntimeError` if the pool is shut down."""
        held = [partial(fn, *args, **kwargs)]

        def run() -> T:
            thread = threading.get_ident()
            self._started_at[thread] = time.monotonic()
            try:
                return held.pop()()
            finally:
                del self._started_at[thread]

        pending = super().submit(run)
        pending.add_done_callback(lambda _: held.clear())
        return pending
