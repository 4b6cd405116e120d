"""Thread pools that reserve memory for work, and that know how long they have been stuck."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from core.errors import Unavailable

T = TypeVar("T")


class Pool:
    """Threads that run work in order. `budget_bytes` are shared by the work in progress.

    Cancelled work leaves the queue at once, with the image that it refers to. Close it when done.
    """

    def __init__(self, threads: int, name: str, *, budget_bytes: int = 0) -> None:
        self.budget_bytes = self.free_bytes = budget_bytes
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turn = threading.Lock()  # to wait for memory
        self._freed = threading.Condition()
        self._started_at: dict[int, float] = {}  # of the work in progress, by thread

    @property
    def stuck_s(self) -> float:
        """Return for how long every thread has been at the same work, 0 while a thread is free."""
        started_at = list(self._started_at.values())
        return time.monotonic() - max(started_at) if len(started_at) == self._threads else 0.0

    def submit(self, work: Callable[[], T], memory_bytes: int = 0) -> Future[T]:
        """Run `work` once `memory_bytes` of the budget are free. Raises `Unavailable` if the pool is closed."""
        assert memory_bytes <= self.budget_bytes, "it would wait for ever"
        held = [work]
        try:
            pending = self._executor.submit(lambda: self._run(held, memory_bytes))
        except RuntimeError:
            raise Unavailable("the service is stopping; retry later or elsewhere") from None
        pending.add_done_callback(lambda _: held.clear())
        return pending

    def close(self) -> None:
        """Finish what is running or queued, then stop. Idempotent."""
        self._executor.shutdown()

    def _run(self, held: list[Callable[[], T]], memory_bytes: int) -> T:
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self.free_bytes >= memory_bytes)
            self.free_bytes -= memory_bytes
        thread = threading.get_ident()
        self._started_at[thread] = time.monotonic()
        try:
            return held.pop()()
        finally:
            del self._started_at[thread]
            with self._freed:
                self.free_bytes += memory_bytes
                self._freed.notify_all()
