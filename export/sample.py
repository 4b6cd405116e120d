"""A sample of what streams by, drawn evenly, and the same one each time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class CatalogImages:
    """The images of the entity at `row`."""

    row: int
    images: tuple[str, ...]


class Reservoir(Generic[Item]):
    """At most `size` of the items that are added, each as likely as any other (Vitter's algorithm R, seed fixed).

    What is drawn depends on how many were added before, and on nothing else.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._random = random.Random(0)
        self._kept: list[tuple[int, Item]] = []
        self.seen = 0

    def add(self, item: Item) -> None:
        self.seen += 1
        if len(self._kept) < self._size:
            self._kept.append((self.seen, item))
        elif (place := self._random.randrange(self.seen)) < self._size:
            self._kept[place] = (self.seen, item)

    @property
    def items(self) -> list[Item]:
        """What was drawn, in the order in which it came."""
        return [item for _, item in sorted(self._kept, key=lambda kept: kept[0])]
