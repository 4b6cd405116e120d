"""What the service searches and names entities from, whatever engine is behind it.

`index.merged` has the bundle's own index with live changes over it, `index.milvus_view` a Milvus collection.

Shapes: B queries, K entities asked for, I images of one entity, D the embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from index.selection import Selection
from index.store import StoredEntity

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


class LiveState(Protocol):
    """One state of what was changed while serving; another state is another object."""

    @property
    def generation(self) -> int: ...


class EntityView(Protocol):
    """One state of what is served. `search` belongs to the engine's thread, the rest to any.

    `delta` is None where nothing can change; `version` is what its label has after the bundle's.
    """

    @property
    def delta(self) -> LiveState | None: ...
    @property
    def entity_count(self) -> int: ...
    @property
    def version(self) -> str: ...

    def select(self, types: tuple[str, ...]) -> Selection: ...

    def search(
        self, query_embeddings_BD: Float32Array, top_k: int, *, selection: Selection | None = None
    ) -> tuple[Int64Array, Float32Array]: ...

    def by_rows(self, rows: Sequence[int]) -> list[StoredEntity]: ...
    def kept(self, rows: Sequence[int]) -> list[StoredEntity] | None: ...
    def images_of(self, row: int) -> Float32Array: ...
    def heard(self, row: int) -> tuple[tuple[int, int, float], ...]: ...
    def get(self, entity_id: str) -> StoredEntity: ...
    def thumbnail(self, entity_id: str) -> bytes | None: ...
    def search_titles(self, query: str, limit: int = 20) -> list[StoredEntity]: ...


@dataclass(frozen=True, kw_only=True)
class Put:
    """What became of a put: the state after it, and whether the entity is new."""

    delta: LiveState
    created: bool


class LiveChanges(Protocol):
    """Where entities are put and deleted while serving. `delta` is the state as of the last `refresh`.

    `look_every_s` is how often to refresh, for the changes of other processes.
    """

    @property
    def look_every_s(self) -> float: ...
    @property
    def delta(self) -> LiveState: ...

    def refresh(self) -> LiveState: ...
    def put(self, entity: StoredEntity, embedding_D: Float32Array, thumbnail: bytes | None) -> Put: ...
    def delete(self, entity_id: str) -> LiveState: ...
    def close(self) -> None: ...
