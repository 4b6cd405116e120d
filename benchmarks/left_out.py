"""A bundle with some of its entities left out of the search: what it then says to queries for them is said to unknowns.

Nothing is exported again. Answers are those of an export without these entities and the same kind of index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from index.bundle import Bundle
from index.manifest import INDEX_FILE
from index.search import EntityIndex
from index.selection import Selection


class ReducedIndex(EntityIndex):
    """An index that finds only what `left` allows."""

    left: Selection

    def search(
        self,
        query_embeddings_BD: npt.NDArray[np.float32],
        top_k: int,
        parameters: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """As `EntityIndex.search`, over what is left."""
        left = self.left
        if selection is not None:
            left = Selection(selection.types, selection.allowed_E & left.allowed_E)
        return super().search(query_embeddings_BD, top_k, parameters, left)


@dataclass(frozen=True, kw_only=True)
class ReducedBundle(Bundle):
    """A bundle whose index leaves out the entities in `left_out`; its store still knows them."""

    left_out: frozenset[int] = field(default=frozenset())

    def index(self, device: str = "cpu") -> ReducedIndex:
        index = ReducedIndex.read(self.path / INDEX_FILE, self.embeddings(), self.index_manifest.parameters, device)
        with self.store() as store:
            allowed_E = np.ones(len(store), bool)
        allowed_E[list(self.left_out)] = False
        index.left = Selection((), allowed_E)
        return index


def leave_out(bundle: Bundle, share: float) -> ReducedBundle:
    """Leave out about `share` (0 to 1) of the entities, by a hash of their id: the same ones in every catalog."""
    with bundle.store() as store:
        entities = store.by_rows(range(len(store)))
    left_out = frozenset(entity.row for entity in entities if _hash(entity.entity_id) < share)
    return ReducedBundle(**{each.name: getattr(bundle, each.name) for each in fields(bundle)}, left_out=left_out)


def _hash(entity_id: str) -> float:
    """A number from 0 to 1 that follows from the id alone."""
    digest = hashlib.sha256(b"left out " + entity_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
