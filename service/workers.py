"""Threads that do what they are given and tell nobody: who gives it to them has its own way to learn of the end.

A `ThreadPoolExecutor` makes a future for each piece of work, which takes as long as handing the work over.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

Work = tuple[Callable[[], None], Callable[[], None]]  # what is done, and what is done instead once they are closed

log = logging.getLogger("wikiclip.workers")


class Workers:
    """So many threads, which take what is put to them in order. An exception is logged, and nothing else."""

    def __init__(self, threads: int, *, name: str) -> None:
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._closing = threading.Lock()  # nothing is put after the word to end
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, do: Callable[[], None], drop: Callable[[], None]) -> None:
        """Have a thread `do` something, or `drop` it, at once if they are closed, later if they are before its turn."""
        with self._closing:
            if not self._closed:
                self._work.put((do, drop))
                return
        drop()

    def close(self) -> None:
        """Drop what has not been begun, and return when what has is done. Idempotent."""
        with self._closing:
            self._closed = True
        while True:
            try:
                work = self._work.get_nowait()
            except Empty:
                break
            if work is not None:
                _, drop = work
                drop()
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            do, drop = work
            try:
                do()
            except Exception:
                log.exception("work that should not raise does")
            del work, do, drop  # not kept alive until the next comes
