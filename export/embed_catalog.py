"""The catalog through the models, shard by shard: what an export spends its time on.

Shapes: n embeddings of a shard, D embedding width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from catalog import EntityRecord, read_catalog
from catalog.images import LocalImages
from catalog.readers import count_hint
from catalog.tar_shards import TarImages
from core.errors import CatalogError
from core.jsonl import Rejected
from export.base import BaseEntities, write_hashes
from export.config import ExportConfig, check_image_root, describe_model
from export.decode import DecodePool, default_workers
from export.embed import Embedder, chunk_size
from export.prepare import Preparer, Shard, ShardRecords
from export.spool import Spool, SpooledShard
from export.stream import StageTimes, ahead
from export.words import heard_words
from index.embeddings import write_shard
from index.store import StoredEntity
from model.checkpoint import Checkpoint
from model.encoders import TextEncoder

_CHUNKS_AHEAD = 2
Attention = Mapping[int, list[npt.NDArray[np.float32]]]  # of an entity row: for each image, over its text's tokens
WAITING, WRITING = "waiting for images and texts", "waiting for the disk"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`resumed_shards` were finished before; `base_fits` is false of a base from which nothing may be copied."""

    resumed_shards: int
    copied_entities: int
    base_fits: bool


def embed_catalog(config: ExportConfig, checkpoint: Checkpoint, spool: Spool, times: StageTimes) -> Outcome:
    """Finish every shard that is not finished yet. Raises `CatalogError`.

    Reading, decoding and tokenising run a chunk ahead of the models, writing a shard behind them.
    """
    embedder = Embedder(checkpoint, batch_size=config.batch_size, listen=config.store_text, times=times)
    entities = resumed = copied = 0
    total = config.limit or (count_hint(config.catalog) if config.progress else None)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="entities", unit="entity", total=total, disable=not config.progress))
        base = None if config.base is None else stack.enter_context(BaseEntities(config.base))
        base_fits = base is not None and base.fits(
            describe_model(checkpoint), thumbnail_px=config.thumbnail_px, store_text=config.store_text
        )
        pool = stack.enter_context(
            DecodePool(
                LocalImages() if config.images is None else TarImages(config.images),
                checkpoint.image_encoder.preprocessing,
                thumbnail_px=config.thumbnail_px,
                workers=config.workers or default_workers(),
            )
        )
        preparer = Preparer(
            pool,
            checkpoint.text_encoder,
            chunk_size=chunk_size(checkpoint, config.batch_size),
            store_text=config.store_text,
            base=base if base_fits else None,
        )

        def unfinished() -> Iterator[Shard]:
            nonlocal entities, resumed
            for shard in _shards(config):
                entities += len(shard.records)
                if spool.has_shard(shard.number):
                    resumed += 1
                    bar.update(len(shard.records))
                else:
                    yield shard

        writer = stack.enter_context(ShardWriter(spool, checkpoint.text_encoder, times))
        chunks = stack.enter_context(closing(ahead(preparer.chunks(unfinished()), _CHUNKS_AHEAD)))
        rows: list[int] = []
        embeddings: list[npt.NDArray[np.float32]] = []
        attention: dict[int, list[npt.NDArray[np.float32]]] = defaultdict(list)
        while (chunk := times.next(WAITING, chunks)) is not None:
            rows += chunk.rows
            embedded = embedder.embed(chunk)
            embeddings.append(embedded.embeddings_BD)
            for row, weights_T in zip(chunk.rows, embedded.attention, strict=config.store_text):
                attention[row].append(weights_T)
            if chunk.ends is not None:
                check_image_root(config)  # else a shard would be finished in which every image seems missing
                copied += len(chunk.ends.copied)
                writer.write(chunk.ends, rows, np.concatenate(embeddings), attention)
                bar.update(len(chunk.ends.entities))
                rows, embeddings, attention = [], [], defaultdict(list)
    if entities == 0:
        spool.remove()  # nothing was made that could be taken up again
        raise CatalogError(f"{config.catalog} holds no usable entity record; see the interface of catalogs in the docs")
    return Outcome(resumed_shards=resumed, copied_entities=copied, base_fits=base_fits)


class ShardWriter:
    """Writes finished shards, one while the models work on the next."""

    def __init__(self, spool: Spool, text_encoder: TextEncoder, times: StageTimes) -> None:
        self._spool = spool
        self._text_encoder = text_encoder
        self._times = times
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None and self._pending is not None:
            self._pending.result()

    def write(
        self,
        records: ShardRecords,
        rows: Sequence[int],
        embeddings_nD: npt.NDArray[np.float32],
        attention: Attention,
    ) -> None:
        """Hand a shard over, once the one before is written. Raises what writing that one did."""
        if self._pending is not None:
            with self._times.measure(WRITING):
                self._pending.result()
        self._pending = self._thread.submit(self._write, records, rows, embeddings_nD, attention)

    def _write(
        self,
        records: ShardRecords,
        rows: Sequence[int],
        embeddings_nD: npt.NDArray[np.float32],
        attention: Attention,
    ) -> None:
        number = records.shard.number
        all_rows_n = np.array([*rows, *(row for row, copied_kD in records.copied for _ in copied_kD)], np.int64)
        all_nD = np.concatenate([embeddings_nD.astype(np.float16), *(copied_kD for _, copied_kD in records.copied)])
        order_n = np.argsort(all_rows_n, kind="stable")
        write_shard(self._spool.embeddings, number, all_rows_n[order_n], all_nD[order_n])
        write_hashes(self._spool.embeddings, number, records.content_hashes)
        self._spool.finish_shard(
            number,
            SpooledShard(
                entities=[(self._with_words(entity, attention), webp) for entity, webp in records.entities],
                rejected=records.shard.rejected,
                images_failed=records.images_failed,
            ),
        )

    def _with_words(self, entity: StoredEntity, attention: Attention) -> StoredEntity:
        """The entity with the words of its text that weighed most, over all its images; as it is if not embedded."""
        if entity.row not in attention:
            return entity
        assert entity.text is not None, "words are only kept beside the text"
        (spans_T,) = self._text_encoder.token_spans([entity.text])
        mean_T = np.mean(attention[entity.row], axis=0).tolist()
        return replace(entity, heard=heard_words(entity.text, spans_T, mean_T))


def _shards(config: ExportConfig) -> Iterator[Shard]:
    """The catalog in shards; a bad record goes with the shard in which it stands."""
    records: list[EntityRecord] = []
    rejected: list[Rejected] = []
    number = first_row = 0
    for item in _limited(read_catalog(config.catalog, config.image_root), config.limit):
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


def _limited(items: Iterator[EntityRecord | Rejected], limit: int | None) -> Iterator[EntityRecord | Rejected]:
    """The items up to the last of `limit` entities; nothing after it is even read."""
    taken = 0
    while (limit is None or taken < limit) and (item := next(items, None)) is not None:
        yield item
        taken += isinstance(item, EntityRecord)
