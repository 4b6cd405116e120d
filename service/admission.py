"""How many images are accepted at a time, and what is said to the others."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from core.errors import TooManyRequests

_WINDOW_S = 10.0
_ENOUGH_BUSY_S = 0.5  # a rate measured over less says nothing
_SHARE_OF_DEADLINE = 0.7  # what is accepted is to be answered within the deadline though the rate wavers
_MAX_RETRY_AFTER_S = 60


class Admission:
    """Counts images from acceptance to answer, by one rule for single and batch requests. For one event loop.

    There is room for `limit` images, or for as many as leave within most of `deadline_s` at the rate at which images
    left lately, where those are fewer: whoever would wait in vain is told so at once. For `always` images there is
    room whatever the rate. `on_refusal` is told of each refusal, with the number of images.
    """

    def __init__(
        self,
        limit: int,
        *,
        always: int = 1,
        deadline_s: float = math.inf,
        on_refusal: Callable[[int], None] = lambda images: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.in_flight = 0
        self._limit = limit
        self._always = min(always, limit)
        self._deadline_s = deadline_s
        self._on_refusal = on_refusal
        self._now = now
        self._done: deque[tuple[float, int, float]] = deque()  # when, how many, seconds of work since the one before
        self._done_images, self._done_busy_s = 0, 0.0  # the sums of these
        self._busy_since = 0.0

    def refuse_if_full(self, images: int) -> None:
        """Raises `TooManyRequests` where there is no room for `images`."""
        rate = self._rate()
        room = self._room(rate)
        if self.in_flight + images > room:
            self._on_refusal(images)
            wait_s = self._wait_s(images, room, rate)
            raise TooManyRequests(
                f"{self.in_flight} images are being answered, {room} is the limit now; try again in {wait_s} s",
                retry_after_s=wait_s,
            )

    @property
    def room(self) -> int:
        """Images that may be in flight now."""
        return self._room(self._rate())

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold room for `images` while the block runs. Raises `TooManyRequests` where there is not enough."""
        self.refuse_if_full(images)
        if self.in_flight == 0:
            self._busy_since = self._now()
        self.in_flight += images
        try:
            yield
        finally:
            now = self._now()
            self.in_flight -= images
            busy_s = now - self._busy_since
            self._done.append((now, images, busy_s))
            self._done_images += images
            self._done_busy_s += busy_s
            self._busy_since = now

    def retry_after_s(self, images: int) -> int:
        """Whole seconds until there is room for `images`, by the rate at which images left in the last seconds."""
        rate = self._rate()
        return self._wait_s(images, self._room(rate), rate)

    def _room(self, rate: float | None) -> int:
        if rate is None or not math.isfinite(self._deadline_s):
            return self._limit
        return min(self._limit, max(self._always, int(rate * self._deadline_s * _SHARE_OF_DEADLINE)))

    def _wait_s(self, images: int, room: int, rate: float | None) -> int:
        if rate is None:
            return 1
        return min(max(math.ceil((self.in_flight + images - room) / rate), 1), _MAX_RETRY_AFTER_S)

    def _rate(self) -> float | None:
        """Images a second while there was something to do, in the last seconds of that; None where that was too short.

        An idle service is not a slow one: time without images does not count.
        """
        horizon = self._now() - _WINDOW_S
        while self._done and self._done[0][0] < horizon:
            _, images, busy_s = self._done.popleft()
            self._done_images -= images
            self._done_busy_s -= busy_s
        if self._done_busy_s < _ENOUGH_BUSY_S:
            return None
        return self._done_images / self._done_busy_s
