"""Shards of records in, embedded shards out: what an export spends its time on. This is the local engine.

Shapes: n embeddings of a shard, D embedding width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from catalog.images import ImageReader, LocalImages, TarImages
from export.base import BaseEntities
from export.config import ExportConfig
from export.decode import DecodePool, default_workers
from export.embed import Embedder, chunk_size
from export.prepare import Preparer, Shard, ShardRecords
from export.stream import StageTimes, ahead
from model.checkpoint import Checkpoint

_CHUNKS_AHEAD = 2
WAITING = "waiting for images and texts"
Attention = Mapping[int, list[npt.NDArray[np.float32]]]  # of an entity row: for each image, over its text's tokens


@dataclass(frozen=True, kw_only=True)
class EmbeddedShard:
    """A shard with the embeddings of what was not copied: `rows` says which entity each belongs to, in order."""

    records: ShardRecords
    rows: Sequence[int]
    embeddings_nD: npt.NDArray[np.float32]
    attention: Attention


def embed_shards(
    config: ExportConfig,
    checkpoint: Checkpoint,
    shards: Iterable[Shard],
    times: StageTimes,
    *,
    base: BaseEntities | None = None,
    done: Callable[[int], object] = lambda row: None,
) -> Generator[EmbeddedShard]:
    """Embed shards in their order, on this machine. `base` holds what is copied where it is unchanged.

    Reading, decoding and tokenising run a chunk ahead of the models. `done` is told of the rows that have passed them.
    """
    embedder = Embedder(checkpoint, batch_size=config.batch_size, listen=config.store_text, times=times)
    with ExitStack() as stack:
        pool = stack.enter_context(decode_pool(config, checkpoint))
        preparer = preparer_of(config, checkpoint, pool, base)
        chunks = stack.enter_context(closing(ahead(preparer.chunks(shards), _CHUNKS_AHEAD)))
        gathered = ShardBuilder()
        while (chunk := times.next(WAITING, chunks)) is not None:
            embedded = embedder.embed(chunk)
            if chunk.rows:
                done(chunk.rows[-1])
            if chunk.ends is not None:
                done(chunk.ends.shard.first_row + len(chunk.ends.entities) - 1)
            shard = gathered.add(chunk.rows, chunk.ends, embedded.embeddings_BD, embedded.attention)
            if shard is not None:
                yield shard


class ShardBuilder:
    """Gathers the chunks of a shard, given in order."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._embeddings: list[npt.NDArray[np.float32]] = []
        self._attention: dict[int, list[npt.NDArray[np.float32]]] = defaultdict(list)

    def add(
        self,
        rows: Sequence[int],
        ends: ShardRecords | None,
        embeddings_BD: npt.NDArray[np.float32],
        attention: Sequence[npt.NDArray[np.float32]],
    ) -> EmbeddedShard | None:
        """The shard where this chunk is its last, else None. `attention` is empty where no embedder listens."""
        self._rows += rows
        self._embeddings.append(embeddings_BD)
        if attention:
            for row, weights_T in zip(rows, attention, strict=True):
                self._attention[row].append(weights_T)
        if ends is None:
            return None
        shard = EmbeddedShard(
            records=ends,
            rows=self._rows,
            embeddings_nD=np.concatenate(self._embeddings),
            attention=self._attention,
        )
        self._rows, self._embeddings, self._attention = [], [], defaultdict(list)
        return shard


def decode_pool(config: ExportConfig, checkpoint: Checkpoint) -> DecodePool:
    return DecodePool(
        image_reader(config),
        checkpoint.image_encoder.preprocessing,
        thumbnail_px=config.thumbnail_px,
        workers=config.workers or default_workers(),
    )


def image_reader(config: ExportConfig) -> ImageReader:
    return LocalImages() if config.images is None else TarImages(config.images)


def preparer_of(config: ExportConfig, checkpoint: Checkpoint, pool: DecodePool, base: BaseEntities | None) -> Preparer:
    return Preparer(
        pool,
        checkpoint.text_encoder,
        chunk_size=chunk_size(checkpoint, config.batch_size),
        store_text=config.store_text,
        base=base,
    )
