"""The catalog through an engine, shard by shard, each written as soon as it is finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass

from tqdm import tqdm

from catalog import EntityRecord, read_catalog
from catalog.formats import count_hint
from core.errors import CatalogError
from core.jsonl import Rejected
from export.base import BaseEntities
from export.config import ExportConfig, check_image_root, describe_model
from export.engine import embed_shards
from export.prepare import Shard
from export.sample import CatalogImages, Reservoir
from export.staging import StagingDir
from export.stream import StageTimes
from export.write import ShardWriter
from model.checkpoint import Checkpoint

SAMPLED_ENTITIES = 512  # with images, for what is measured on the catalog's own


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`resumed_shards` were finished before; `base_fits` is false of a base from which nothing may be copied.

    `sample` has the images of some entities from all over the catalog, the same ones each time.
    """

    resumed_shards: int
    copied_entities: int
    base_fits: bool
    sample: Sequence[CatalogImages]


def embed_catalog(config: ExportConfig, checkpoint: Checkpoint, spool: StagingDir, times: StageTimes) -> Outcome:
    """Finish every shard that is not finished yet. Raises `CatalogError`."""
    entities = resumed = copied = 0
    sample: Reservoir[CatalogImages] = Reservoir(SAMPLED_ENTITIES)
    total = config.limit or (count_hint(config.catalog) if config.progress else None)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="entities", unit="entity", total=total, disable=not config.progress))
        base = None if config.base is None else stack.enter_context(BaseEntities(config.base))
        base_fits = base is not None and base.fits(
            describe_model(checkpoint), thumbnail_px=config.thumbnail_px, store_text=config.store_text
        )

        def unfinished() -> Iterator[Shard]:
            nonlocal entities, resumed
            for shard in read_shards(config):
                entities += len(shard.records)
                for row, record in enumerate(shard.records, shard.first_row):
                    if record.images:
                        sample.add(CatalogImages(row=row, images=tuple(record.images)))
                if spool.has_shard(shard.number):
                    resumed += 1
                else:
                    yield shard

        writer = stack.enter_context(ShardWriter(spool, checkpoint.text_encoder, times))

        def advance(row: int) -> None:
            bar.update(max(0, row + 1 - bar.n))

        if config.engine == "ray":
            from export.ray_engine import embed_shards_on_ray

            numbers = [shard.number for shard in unfinished()]
            shards = embed_shards_on_ray(config, checkpoint, numbers, copy_from_base=base_fits, done=advance)
        else:
            shards = embed_shards(
                config, checkpoint, unfinished(), times, base=base if base_fits else None, done=advance
            )
        for embedded in stack.enter_context(closing(shards)):
            check_image_root(config)  # else a shard would be finished in which every image seems missing
            copied += len(embedded.records.copied)
            writer.write(embedded)
    if entities == 0:
        spool.remove()  # nothing was made that could be taken up again
        raise CatalogError(f"{config.catalog} holds no usable entity record; see the interface of catalogs in the docs")
    return Outcome(resumed_shards=resumed, copied_entities=copied, base_fits=base_fits, sample=sample.items)


def read_shards(config: ExportConfig) -> Iterator[Shard]:
    """The catalog in shards; a bad record goes with the shard in which it stands."""
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
    """The records up to the last of `limit` entities; nothing after it is even read."""
    items, taken = read_catalog(config.catalog, config.image_root), 0
    while (config.limit is None or taken < config.limit) and (item := next(items, None)) is not None:
        yield item
        taken += isinstance(item, EntityRecord)
