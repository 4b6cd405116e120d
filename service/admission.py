"""How many images are accepted at a time, and what is said to the others."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import TooManyRequests

_WINDOW_S = 10.0
_MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts images from acceptance to answer, by one rule for single and batch requests. For one event loop."""

    def __init__(self, limit: int, on_refusal: Callable[[int], None] = lambda images: None) -> None:
        """`on_refusal` is told of each refusal, with the number of images."""
        self.limit = limit
        self._on_refusal = on_refusal
        self.in_flight = 0
        self._done: deque[tuple[float, int]] = deque()  # (when, how many), of the last seconds

    def refuse_if_full(self, images: int) -> None:
        """Raises `TooManyRequests` where there is no room for `images`."""
        if self.in_flight + images > self.limit:
            self._on_refusal(images)
            wait_s = self.retry_after_s(images)
            raise TooManyRequests(
                f"{self.in_flight} images are being answered, {self.limit} is the limit; try again in {wait_s} s",
                retry_after_s=wait_s,
            )

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold room for `images` while the block runs. Raises `TooManyRequests` where there is not enough."""
        self.refuse_if_full(images)
        self.in_flight += images
        try:
            yield
        finally:
            self.in_flight -= images
            self._done.append((time.monotonic(), images))
            self._forget_old()

    def retry_after_s(self, images: int) -> int:
        """Whole seconds until there is room for `images`, by the rate at which images left in the last seconds."""
        self._forget_old()
        if not self._done:
            return 1
        elapsed_s = max(time.monotonic() - self._done[0][0], 1.0)
        rate = sum(count for _, count in self._done) / elapsed_s
        excess = self.in_flight + images - self.limit
        return min(max(math.ceil(excess / rate), 1), _MAX_RETRY_AFTER_S)

    def _forget_old(self) -> None:
        horizon = time.monotonic() - _WINDOW_S
        while self._done and self._done[0][0] < horizon:
            self._done.popleft()
