"""A uniform sample of a stream."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

Item = TypeVar("Item")


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
