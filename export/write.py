"""Finished shards to disk, one while the models work on the next.

Shapes: n embeddings of a shard, D embedding width.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np

from export.base import write_hashes
from export.engine import Attention, EmbeddedShard
from export.staging import StagedShard, StagingDir
from export.stream import StageTimes
from export.words import find_attended_words
from index.embeddings import write_shard
from index.store import StoredEntity
from model.encoders import TextEncoder

WRITING = "waiting for the disk"


class ShardWriter:
    """Writes finished shards, one while the models work on the next."""

    def __init__(self, spool: StagingDir, text_encoder: TextEncoder, times: StageTimes) -> None:
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

    def write(self, embedded: EmbeddedShard) -> None:
        """Hand a shard over, once the one before is written. Raises what writing that one did."""
        if self._pending is not None:
            with self._times.measure(WRITING):
                self._pending.result()
        self._pending = self._thread.submit(self._write, embedded)

    def _write(self, embedded: EmbeddedShard) -> None:
        records, embeddings_nD = embedded.records, embedded.embeddings_nD
        number = records.shard.number
        all_rows_n = np.array(
            [*embedded.rows, *(row for row, copied_kD in records.copied for _ in copied_kD)], np.int64
        )
        all_nD = np.concatenate([embeddings_nD.astype(np.float16), *(copied_kD for _, copied_kD in records.copied)])
        order_n = np.argsort(all_rows_n, kind="stable")
        write_shard(self._spool.embeddings, number, all_rows_n[order_n], all_nD[order_n])
        write_hashes(self._spool.embeddings, number, records.content_hashes)
        self._spool.finish_shard(
            number,
            StagedShard(
                entities=[(self._with_words(entity, embedded.attention), webp) for entity, webp in records.entities],
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
        return replace(entity, attended_words=find_attended_words(entity.text, spans_T, mean_T))
