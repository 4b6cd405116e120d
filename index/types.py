"""The hierarchy of types: which types are kinds of which others. It need not be a tree, and cycles are allowed.

A record names a type by its key or by its label. A type of Wikidata has its item number as key and its English name as
label, and a label that two of them share ends with the key: `bank (Q22687)`. Then `bank` names both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

_CACHED = 8192  # lists of types


@dataclass(frozen=True, kw_only=True)
class TypeParents:
    """A type with the keys of its direct parents. Without a `label`, it is shown by its key."""

    type: str
    parents: tuple[str, ...]
    label: str = ""


class TypeHierarchy:
    """The types of a bundle with their ancestors and descendants. A type that no row names has neither.

    Rows for one type are merged. Immutable and thread-safe.
    """

    def __init__(self, rows: Iterable[TypeParents] = ()) -> None:
        self._parents: dict[str, list[str]] = {}
        self._children: dict[str, list[str]] = {}
        self._labels: dict[str, str] = {}
        for row in rows:
            self._parents.setdefault(row.type, []).extend(row.parents)
            for parent in row.parents:
                self._children.setdefault(parent, []).append(row.type)
            if row.label:
                self._labels.setdefault(row.type, row.label)
        self._named: dict[str, list[str]] = {}
        for key in self._parents.keys() | self._children.keys():
            for name in self._names(key):
                self._named.setdefault(name, []).append(key)
        # Not caches of methods, which would be reference cycles: swapped bundles would wait for the garbage collector.
        self._reached = lru_cache(maxsize=_CACHED)(partial(_reached, self._parents, self._named))
        self._reached_below = lru_cache(maxsize=64)(partial(_reached, self._children, self._named))

    def rows(self) -> list[TypeParents]:
        """Return one row per type that has parents or a label, as the constructor takes them."""
        return [
            TypeParents(type=key, parents=tuple(dict.fromkeys(parents)), label=self._labels.get(key, ""))
            for key, parents in self._parents.items()
        ]

    def label(self, key: str) -> str:
        """Return what to show for a type."""
        return self._labels.get(key, key)

    def title(self, key: str) -> str:
        """Return what to show for a type where its key is shown, too."""
        return self.label(key).removesuffix(f" ({key})")

    def names_above(self, types: tuple[str, ...]) -> frozenset[str]:
        """Return every name by which some types of a record, or their ancestors, can be asked for."""
        return frozenset(types).union(*map(self._names, self.ancestors(types)))

    def ancestors(self, types: tuple[str, ...]) -> frozenset[str]:
        """Return the keys of some types, given by name, and of all their ancestors."""
        return self._reached(types)

    def names_below(self, types: tuple[str, ...]) -> frozenset[str]:
        """Return every name by which a record can have one of some types, or a descendant of one."""
        return frozenset(types).union(*map(self._names, self._reached_below(types)))

    def _names(self, key: str) -> Collection[str]:
        return {key, self.label(key), self.title(key)}


def _reached(
    edges: Mapping[str, Iterable[str]], named: Mapping[str, Iterable[str]], names: tuple[str, ...]
) -> frozenset[str]:
    """Return the keys of some types, given by name, and everything that edges lead to from them."""
    found = {key for name in names for key in named.get(name, (name,))}
    waiting = list(found)
    while waiting:
        new = set(edges.get(waiting.pop(), ())) - found
        found |= new
        waiting.extend(new)
    return frozenset(found)
