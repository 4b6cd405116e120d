"""Names as paths of token ids: which tokens may come next, and which name has been spelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class PrefixTree:
    """A tree over token sequences, each closed by the token `end`. Of two equal names the first one counts."""

    def __init__(self, names: Iterable[Sequence[int]], end: int) -> None:
        self._end = end
        self._root: dict[int, Any] = {}
        for position, tokens in enumerate(names):
            node = self._root
            for token in tokens:
                node = node.setdefault(token, {})
            node.setdefault(end, position)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """The tokens that may follow. Behind a name, and off the tree, only the end follows: what beam search asks of
        beams that are done, or that it keeps with a probability of zero.
        """
        node = self._node(prefix)
        return list(node) if node is not None else [self._end]

    def only_name(self, prefix: Sequence[int]) -> int | None:
        """The position of the name, where just one begins like this; else None."""
        node = self._node(prefix)
        if node is None:
            return None
        while len(node) == 1:
            token, below = next(iter(node.items()))
            if token == self._end:
                return int(below)
            node = below
        return None

    def name(self, tokens: Sequence[int]) -> int:
        """The position of the name that these tokens, up to the first end, spell. Raises `KeyError` if none does."""
        node = self._root
        for token in tokens:
            if token == self._end:
                break
            node = node[token]
        return int(node[self._end])

    def _node(self, prefix: Sequence[int]) -> dict[int, Any] | None:
        node: Any = self._root
        for token in prefix:
            if token == self._end or token not in node:
                return None
            node = node[token]
        assert isinstance(node, dict)
        return node
