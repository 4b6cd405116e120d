"""What an export will take, before it is begun: counted from the whole catalog, timed on a sample from all over it.

The sample goes through the very stages of the export, overlapping as they do, so the times of the main thread add up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from catalog import EntityRecord
from core.errors import CatalogError
from core.jsonl import Rejected
from export.base import BaseEntities
from export.config import ExportConfig, check_inputs, describe_model, load_checkpoint
from export.decode import HASH_BYTES
from export.embed_catalog import read_records
from export.engine import WAITING, embed_shards
from export.onnx_export import stored_bytes
from export.prepare import Shard
from export.sample import Reservoir
from export.staging import StagingDir
from export.stream import StageTimes
from export.write import WRITING, ShardWriter
from index.manifest import STORE_FILE
from index.store import write_store
from model.checkpoint import Checkpoint
from model.encoders import resolve_device

_SAMPLE = 2048  # entities, at most
_MEASURED_S = 10.0
_WARM_UP_SHARDS, _WARM_UP_S = 3, 5.0
_NPY_HEADER_BYTES = 128
STORE, ALONE = "store", {WAITING: "reading, decoding and tokenising", WRITING: "writing shards"}


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """`disk_bytes` by part of the bundle, `work_bytes` besides them until it is whole. `seconds` by stage: what the
    main thread spends, one after the other, so that they add up to `total_s`; ONNX files, which take the same time
    whatever the catalog, are not in it. `measured_entities` were timed.
    """

    entities: int
    with_image: int
    rejected: int
    embeddings: int
    shards: int
    disk_bytes: dict[str, int]
    work_bytes: int
    seconds: dict[str, float]
    total_s: float
    entities_per_s: float
    bottleneck: str
    measured_entities: int
    device: str


def plan_export(config: ExportConfig) -> ExportPlan:
    """Read the catalog once, export a sample of it into a temporary folder, and say what the whole will take.

    Raises `CatalogError`, `CheckpointError`, `EncoderSpecError`.
    """
    check_inputs(config)
    device = resolve_device(config.device)
    checkpoint = load_checkpoint(config, device)
    sample: Reservoir[EntityRecord] = Reservoir(_SAMPLE)
    rejected = with_image = 0
    for item in tqdm(read_records(config), desc="reading", unit="record", disable=not config.progress):
        if isinstance(item, Rejected):
            rejected += 1
        else:
            sample.add(item)
            with_image += bool(item.images)
    if not sample.seen:
        raise CatalogError(f"{config.catalog} holds no usable entity record; see the interface of catalogs in the docs")
    measured = _measure(config, checkpoint, sample.items)
    entities, shards = sample.seen, -(-sample.seen // config.shard_size)
    embeddings = round(entities * measured.embeddings_per_entity)
    dim = checkpoint.image_encoder.embedding_dim
    encoder_bytes = stored_bytes(checkpoint.image_encoder, half=config.half)
    seconds = {stage: round(entities * each_s, 3) for stage, each_s in measured.seconds_per_entity.items()}
    total_s = sum(seconds.values())
    return ExportPlan(
        entities=entities,
        with_image=with_image,
        rejected=rejected,
        embeddings=embeddings,
        shards=shards,
        disk_bytes={
            "embeddings": embeddings * (2 * dim + 8) + entities * HASH_BYTES + 3 * shards * _NPY_HEADER_BYTES,
            "index": embeddings * 4 * dim,
            "store": round(entities * measured.store_bytes_per_entity),
            "image encoder": encoder_bytes,
            **{
                f"{precision} encoder": stored_bytes(checkpoint.image_encoder, half=False) // shrunk
                for precision, shrunk, asked_for in (("int8", 4, config.int8), ("float16", 2, config.float16))
                if asked_for
            },
        },
        work_bytes=round(entities * measured.work_bytes_per_entity),
        seconds=seconds,
        total_s=round(total_s, 3),
        entities_per_s=round(entities / total_s, 2) if total_s else 0.0,
        bottleneck=max(seconds, key=seconds.__getitem__),
        measured_entities=measured.entities,
        device=device.type,
    )


@dataclass(frozen=True, kw_only=True)
class _Measured:
    entities: int
    embeddings_per_entity: float
    seconds_per_entity: dict[str, float]
    store_bytes_per_entity: float
    work_bytes_per_entity: float


def _measure(config: ExportConfig, checkpoint: Checkpoint, records: list[EntityRecord]) -> _Measured:
    """Export the records as small shards, without counting the first ones: processes start, memory is taken."""
    times = StageTimes()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="plan.")))
        spool = StagingDir(folder)
        spool.begin({})
        base = None if config.base is None else stack.enter_context(BaseEntities(config.base))
        fits = base is not None and base.fits(
            describe_model(checkpoint), thumbnail_px=config.thumbnail_px, store_text=config.store_text
        )
        shards = list(_small_shards(records, config.batch_size))
        warm_up = min(_WARM_UP_SHARDS, len(shards) // 2)
        bar = stack.enter_context(tqdm(desc="sample", unit="entity", total=len(records), disable=not config.progress))
        started = time.monotonic()
        with ShardWriter(spool, checkpoint.text_encoder, times) as writer:
            embedded_shards = embed_shards(config, checkpoint, shards, times, base=base if fits else None)
            measured = all_entities = embeddings = 0
            for number, embedded in enumerate(stack.enter_context(closing(embedded_shards))):
                writer.write(embedded)
                count = len(embedded.records.entities)
                bar.update(count)
                all_entities += count
                embeddings += len(embedded.rows) + sum(len(copied_kD) for _, copied_kD in embedded.records.copied)
                warm = number < warm_up
                elapsed_s = time.monotonic() - started
                if warm and (number == warm_up - 1 or elapsed_s > _WARM_UP_S):
                    warm_up = number  # this was the last one that does not count
                    times.seconds.clear()
                    started = time.monotonic()
                elif not warm:
                    measured += count
                    if elapsed_s > _MEASURED_S:
                        break
        store = folder / STORE_FILE
        with times.measure(STORE):
            write_store(store, spool.entities())
        store_s = times.seconds.pop(STORE)
        write_store(folder / "empty.sqlite", iter(()))
        work_bytes = sum(file.stat().st_size for file in (folder / ".partial" / "shards").iterdir())
        store_bytes = store.stat().st_size - (folder / "empty.sqlite").stat().st_size
    seconds = {ALONE.get(stage, stage): each_s / measured for stage, each_s in times.seconds.items()}
    return _Measured(
        entities=measured,
        embeddings_per_entity=embeddings / all_entities,
        seconds_per_entity={**seconds, STORE: store_s / all_entities},
        store_bytes_per_entity=store_bytes / all_entities,
        work_bytes_per_entity=work_bytes / all_entities,
    )


def _small_shards(records: list[EntityRecord], size: int) -> Iterator[Shard]:
    for number, first in enumerate(range(0, len(records), size)):
        yield Shard(number=number, first_row=first, records=records[first : first + size], rejected=())


def plan_lines(plan: ExportPlan, config: ExportConfig) -> list[str]:
    """A plan as lines of text."""
    parts = ", ".join(f"{name} {_size(each)}" for name, each in plan.disk_bytes.items())
    lines = [
        f"{plan.entities} entities, {plan.with_image} of them with an image, {plan.rejected} record(s) rejected; "
        f"about {plan.embeddings} embeddings in {plan.shards} shard(s) of {config.shard_size}",
        f"on disk {_size(sum(plan.disk_bytes.values()))}: {parts}; {_size(plan.work_bytes)} more while it works",
        f"time by stage, from {plan.measured_entities} entities on {plan.device}:",
    ]
    for stage, stage_s in plan.seconds.items():
        lines.append(f"  {stage:<34}{1000 * stage_s / plan.entities:10.2f} ms an entity{_duration(stage_s):>14}")
    share = 100 * plan.seconds[plan.bottleneck] / plan.total_s if plan.total_s else 0.0
    lines.append(
        f"in all about {_duration(plan.total_s)}, {plan.entities_per_s:.1f} entities/s, besides the ONNX files; "
        f"bottleneck: {plan.bottleneck} ({share:.0f} %)"
    )
    return lines


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{seconds:.1f} s"
