"""Turn catalog records into chunks of model inputs: decoded images and tokenised texts. A chunk never crosses a shard.

A sample is an image with its entity's text, or the text alone for an entity without images. Shapes: H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from catalog import EntityRecord
from catalog.images import ImageReader
from core.arrays import Pixels
from core.lines import Rejected
from export.config import ExportConfig
from export.decode import DecodePool, ImageJob, default_workers, hash_text
from export.reuse import BaseEntities, BaseEntity
from export.shards import Shard, ShardRecords
from imaging import Preprocessing
from index.store import StoredEntity, describe


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Inputs of the models. Sample `i` belongs to the entity at `rows[i]` and has the text `tokens[text_of[i]]`.

    `pixels` is None for a sample without an image. `ends` is set on the last chunk of a shard, which may be empty.
    """

    rows: Sequence[int]
    pixels: Sequence[Pixels | None]
    tokens: Sequence[Sequence[int]]
    text_of: Sequence[int]
    ends: ShardRecords | None = None


Tokenize = Callable[[Sequence[str]], Sequence[Any]]  # `list` where texts are tokenised later or not at all
_Sample = tuple[int, str, Pixels | None]  # entity row, text, image


def prepare_chunks(
    config: ExportConfig,
    pool: DecodePool,
    tokenize: Tokenize,
    shards: Iterable[Shard],
    *,
    chunk_size: int,
    base: BaseEntities | None = None,
) -> Generator[Chunk]:
    """Yield chunks of at most `chunk_size` samples, the last one of each shard with `ends`.

    Unchanged entities of `base` are copied instead.
    """
    for shard in shards:
        records = ShardRecords(shard=shard)
        samples: list[_Sample] = []
        for sample in _samples(config, pool, base, records):
            if len(samples) == chunk_size:
                yield _chunk(samples, tokenize)
                samples = []
            samples.append(sample)
        yield _chunk(samples, tokenize, ends=records)


def _chunk(samples: Sequence[_Sample], tokenize: Tokenize, ends: ShardRecords | None = None) -> Chunk:
    texts = {text: number for number, text in enumerate(dict.fromkeys(text for _, text, _ in samples))}
    return Chunk(
        rows=[row for row, _, _ in samples],
        pixels=[pixels for _, _, pixels in samples],
        tokens=tokenize(list(texts)),  # once for all images of an entity
        text_of=[texts[text] for _, text, _ in samples],
        ends=ends,
    )


def _samples(config: ExportConfig, pool: DecodePool, base: BaseEntities | None, out: ShardRecords) -> Iterator[_Sample]:
    """Yield the samples of a shard's entities, and add everything else to `out`."""
    shard = out.shard
    known = {} if base is None else base.find([record.entity_id for record in shard.records])
    jobs = (_job(record, known.get(record.entity_id)) for record in shard.records)
    for row, (record, decoded) in enumerate(zip(shard.records, pool.map(jobs), strict=True), shard.first_row):
        for image, why in decoded.failures:
            reason = f"image {image}: {why}; the entity is kept without it"
            out.images_failed.append(Rejected(line=record.line, reason=reason, record=record.entity_id))
        out.content_hashes.append(decoded.content_hash)
        failed = {image for image, _ in decoded.failures}
        credits = dict(zip(record.images, record.image_credits, strict=False))
        entity = StoredEntity(
            row=row,
            entity_id=record.entity_id,
            title=record.title,
            titles=record.titles,
            description=record.description or describe(record.title, record.text),
            url=record.url,
            types=record.types,
            symbol=record.symbol,
            image_count=len(decoded.pixels),
            has_text=bool(record.text.strip()),
            text=record.text if config.store_text else None,
            image_credits=tuple(credits.get(image) for image in record.images if credits and image not in failed),
        )
        if decoded.unchanged:
            copied = known[record.entity_id]
            words = copied.attended_words if config.store_text else ()
            entity = replace(entity, image_count=copied.image_count, attended_words=words)
            out.copied.append((row, copied.embeddings_kD))
            out.entities.append((entity, copied.thumbnail))
            continue
        images: Sequence[Pixels | None] = decoded.pixels or [None]
        yield from ((row, record.text, pixels) for pixels in images)
        out.entities.append((entity, decoded.thumbnail))


def _job(record: EntityRecord, known: BaseEntity | None) -> ImageJob:
    job = ImageJob(images=record.images, text_hash=hash_text(record.text))
    if known is None:
        return job
    return replace(job, known_hash=known.content_hash, known_images=known.image_count)


def decode_pool(config: ExportConfig, preprocessing: Preprocessing) -> DecodePool:
    """Return a pool of processes that read and decode the catalog's images."""
    return DecodePool(
        ImageReader(config.images),
        preprocessing,
        thumbnail_px=config.thumbnail_px,
        workers=config.workers or default_workers(),
    )
