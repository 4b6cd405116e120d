"""Samples of streams, and intervals for shares."""

from __future__ import annotations

import math
import random
from typing import Generic, TypeVar

Item = TypeVar("Item")

_Z_95 = 1.959964  # of a 95 % interval


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, from 0 to 1. Unlike a bootstrap's, that of 60 of 60 is not a point."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, _Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


class Reservoir(Generic[Item]):
    """A uniform sample of at most `size` items of a stream (Vitter's algorithm R), the same one each time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = random.Random(0)
        self._sample: list[tuple[int, Item]] = []
        self.seen = 0

    def add(self, item: Item) -> None:
        self.seen += 1
        if len(self._sample) < self._size:
            self._sample.append((self.seen, item))
        elif (place := self._random.randrange(self.seen)) < self._size:
            self._sample[place] = (self.seen, item)

    @property
    def items(self) -> list[Item]:
        """Return the sample in stream order."""
        return [item for _, item in sorted(self._sample, key=lambda entry: entry[0])]
