"""From catalog records to what the models take: images decoded, texts tokenised, in chunks that never cross a shard.

Runs beside the models. A sample is an image, or an entity without one. Shapes: k embeddings of one entity, D embedding
width, H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from catalog import EntityRecord
from core.jsonl import Rejected
from export.base import BaseEntities, BaseEntity
from export.decode import DecodePool, ImageJob, Pixels, hash_text
from index.store import StoredEntity, first_sentence


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Records of the catalog as they go into shard `number`, the first of them at entity row `first_row`."""

    number: int
    first_row: int
    records: Sequence[EntityRecord]
    rejected: Sequence[Rejected]


@dataclass(kw_only=True)
class ShardRecords:
    """What a shard has besides embeddings to compute: entities with thumbnails, content hashes, embeddings copied."""

    shard: Shard
    entities: list[tuple[StoredEntity, bytes | None]] = field(default_factory=list)
    content_hashes: list[bytes] = field(default_factory=list)
    images_failed: list[Rejected] = field(default_factory=list)
    copied: list[tuple[int, npt.NDArray[np.float16]]] = field(default_factory=list)  # entity row, its embeddings [k, D]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Samples for the models: `rows` says which entity each belongs to, `text_of` which of the distinct `tokens`.

    `pixels` is None of a sample without an image. `ends` is set on the last chunk of a shard, which may be empty.
    """

    rows: Sequence[int]
    pixels: Sequence[Pixels | None]
    tokens: Sequence[Sequence[int]]
    text_of: Sequence[int]
    ends: ShardRecords | None = None


@dataclass(frozen=True, kw_only=True)
class _Sample:
    row: int
    text: str
    pixels: Pixels | None


class Tokenizer(Protocol):
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...


class Preparer:
    """Makes chunks of `chunk_size` samples. `base` holds the entities whose embeddings may be copied."""

    def __init__(
        self,
        pool: DecodePool,
        tokenizer: Tokenizer,
        *,
        chunk_size: int,
        store_text: bool = False,
        base: BaseEntities | None = None,
    ) -> None:
        self._pool = pool
        self._tokenizer = tokenizer
        self._chunk_size = chunk_size
        self._store_text = store_text
        self._base = base

    def chunks(self, shards: Iterable[Shard]) -> Generator[Chunk]:
        """The chunks of some shards, each shard's last one with `ends`."""
        for shard in shards:
            records = ShardRecords(shard=shard)
            samples: list[_Sample] = []
            for sample in self._samples(shard, records):
                if len(samples) == self._chunk_size:
                    yield self._chunk(samples)
                    samples = []
                samples.append(sample)
            yield self._chunk(samples, ends=records)

    def _chunk(self, samples: Sequence[_Sample], ends: ShardRecords | None = None) -> Chunk:
        texts = {text: number for number, text in enumerate(dict.fromkeys(sample.text for sample in samples))}
        return Chunk(
            rows=[sample.row for sample in samples],
            pixels=[sample.pixels for sample in samples],
            tokens=self._tokenizer.tokenize(list(texts)),  # images of one entity share theirs
            text_of=[texts[sample.text] for sample in samples],
            ends=ends,
        )

    def _samples(self, shard: Shard, out: ShardRecords) -> Iterator[_Sample]:
        known = {} if self._base is None else self._base.find([record.entity_id for record in shard.records])
        jobs = (_job(record, known.get(record.entity_id)) for record in shard.records)
        for row, (record, decoded) in enumerate(zip(shard.records, self._pool.map(jobs), strict=True), shard.first_row):
            for image, why in decoded.failures:
                reason = f"image {image}: {why}; the entity is kept without it"
                out.images_failed.append(Rejected(line=record.line, reason=reason, record=record.entity_id))
            out.content_hashes.append(decoded.content_hash)
            if decoded.unchanged:
                copied = known[record.entity_id]
                out.copied.append((row, copied.embeddings_kD))
                entity = self._stored(record, row, copied.image_count)
                if self._store_text:
                    entity = replace(entity, attended_words=copied.attended_words)
                out.entities.append((entity, copied.thumbnail))
                continue
            if not decoded.pixels:
                yield _Sample(row=row, text=record.text, pixels=None)
            for pixels in decoded.pixels:
                yield _Sample(row=row, text=record.text, pixels=pixels)
            out.entities.append((self._stored(record, row, len(decoded.pixels)), decoded.thumbnail))

    def _stored(self, record: EntityRecord, row: int, image_count: int) -> StoredEntity:
        return StoredEntity(
            row=row,
            entity_id=record.entity_id,
            title=record.title,
            titles=record.titles,
            description=record.description or first_sentence(record.text),
            url=record.url,
            types=record.types,
            symbol=record.symbol,
            image_count=image_count,
            has_text=bool(record.text.strip()),
            text=record.text if self._store_text else None,
        )


def _job(record: EntityRecord, known: BaseEntity | None) -> ImageJob:
    text_hash = hash_text(record.text)
    if known is None:
        return ImageJob(images=record.images, text_hash=text_hash)
    return ImageJob(
        images=record.images,
        text_hash=text_hash,
        known_hash=known.content_hash,
        known_images=known.image_count,
    )
