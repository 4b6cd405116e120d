"""Shards of the catalog, before and after embedding, and what every engine uses: prefetching, stage times.

Shapes: B samples of a chunk, n embeddings of a shard, k embeddings of one entity, T text tokens, D embedding width.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from catalog import EntityRecord, read_catalog
from core.lines import Rejected
from export.config import ExportConfig
from index.store import StoredEntity

Item = TypeVar("Item")
EntityImages = tuple[int, tuple[str, ...]]  # an entity row and its images


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Records of shard `number`, the first of them at entity row `first_row`, and the bad records among them."""

    number: int
    first_row: int
    records: Sequence[EntityRecord]
    rejected: Sequence[Rejected]


@dataclass(kw_only=True)
class ShardRecords:
    """The results of a shard besides new embeddings. `copied` holds entity rows with the embeddings [k, D] reused."""

    shard: Shard
    entities: list[tuple[StoredEntity, bytes | None]] = field(default_factory=list)  # with their thumbnails
    content_hashes: list[bytes] = field(default_factory=list)
    images_failed: list[Rejected] = field(default_factory=list)
    copied: list[tuple[int, npt.NDArray[np.float16]]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EmbeddedChunk:
    """Embeddings float32, L2-normalised, of samples of the entities at `rows`.

    `attention` has the weights [T] of each sample's text tokens if the embedder records them. `ends` is set on the last
    chunk of a shard.
    """

    rows: Sequence[int]
    embeddings_BD: npt.NDArray[np.float32]
    attention: Sequence[npt.NDArray[np.float32]] = ()
    ends: ShardRecords | None = None


@dataclass(frozen=True, kw_only=True)
class EmbeddedShard:
    """A shard with the new embeddings of the entities at `rows`, and the attention of each by entity row."""

    records: ShardRecords
    rows: Sequence[int]
    embeddings_nD: npt.NDArray[np.float32]
    attention: Mapping[int, Sequence[npt.NDArray[np.float32]]]


def join_chunks(chunks: Sequence[EmbeddedChunk]) -> EmbeddedShard:
    """Join all chunks of a shard, in order."""
    records = chunks[-1].ends
    assert records is not None, "the last chunk ends the shard"
    attention: dict[int, list[npt.NDArray[np.float32]]] = defaultdict(list)
    for chunk in chunks:
        for row, weights_T in zip(chunk.rows, chunk.attention, strict=bool(chunk.attention)):
            attention[row].append(weights_T)
    return EmbeddedShard(
        records=records,
        rows=[row for chunk in chunks for row in chunk.rows],
        embeddings_nD=np.concatenate([chunk.embeddings_BD for chunk in chunks]),
        attention=attention,
    )


def read_shards(config: ExportConfig) -> Iterator[Shard]:
    """Yield the catalog in shards. A bad record belongs to the shard in which it occurs."""
    records: list[EntityRecord] = []
    rejected: list[Rejected] = []
    number = first_row = 0
    for item in read_records(config):
        if isinstance(item, Rejected):
            rejected.append(item)
            continue
        records.append(item)
        if len(records) == config.shard_size:
            yield Shard(number=number, first_row=first_row, records=records, rejected=rejected)
            number, first_row = number + 1, first_row + len(records)
            records, rejected = [], []
    if records or rejected:
        yield Shard(number=number, first_row=first_row, records=records, rejected=rejected)


def read_records(config: ExportConfig) -> Iterator[EntityRecord | Rejected]:
    """Yield records until `limit` entities have been read."""
    items, taken = read_catalog(config.catalog, config.image_root), 0
    while (config.limit is None or taken < config.limit) and (item := next(items, None)) is not None:
        yield item
        taken += isinstance(item, EntityRecord)


def prefetch(items: Generator[Item], depth: int) -> Generator[Item]:
    """Yield `items` while a thread computes the next `depth` of them. Exceptions are raised at their item."""
    pending: deque[Future[Item | None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        try:
            for _ in range(depth):
                pending.append(pool.submit(next, items, None))
            while (item := pending.popleft().result()) is not None:
                pending.append(pool.submit(next, items, None))
                yield item
        finally:
            for future in pending:
                future.cancel()
            pool.submit(items.close).result()


class StageTimes:
    """The seconds spent in each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def next(self, stage: str, items: Iterator[Item]) -> Item | None:
        """Return the next item, or None at the end. Waiting for it counts as `stage`."""
        with self.measure(stage):
            return next(items, None)
