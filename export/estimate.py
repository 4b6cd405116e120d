"""Estimate an export before it begins (`--dry-run`): counts from the whole catalog, times from a sample of it.

The sample passes through the same overlapping stages as an export, so the times of the main thread add up.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from catalog import EntityRecord
from core.errors import CatalogError
from core.lines import Rejected
from core.statistics import Reservoir
from export.config import ExportConfig, check_inputs
from export.decode import HASH_BYTES
from export.local import WAITING, embed_shards
from export.model import ExportModel, load_model
from export.onnx import stored_bytes
from export.reuse import open_base
from export.shards import Shard, StageTimes, read_records
from export.staging import STAGING_FOLDER, WRITING, StagingDir, write_shards
from index.manifest import STORE_FILE
from index.store import write_store
from model.encoders import resolve_device

_SAMPLE_ENTITIES = 2048
_MEASURED_S = 10.0
_WARM_UP_SHARDS = 3
_NPY_HEADER_BYTES = 128
_STAGE_NAMES = {WAITING: "reading, decoding and tokenising", WRITING: "writing shards"}


@dataclass(frozen=True, kw_only=True)
class ExportEstimate:
    """The expected size and duration of an export.

    `work_bytes` are needed in addition to `disk_bytes` until the bundle is complete. `seconds` are those of the main
    thread by stage, and add up to `total_s`. They exclude the ONNX files, whose time does not depend on the catalog.
    """

    entities: int
    with_image: int
    rejected: int
    embeddings: int
    shards: int
    disk_bytes: dict[str, int]  # by part of the bundle
    work_bytes: int
    seconds: dict[str, float]
    total_s: float
    entities_per_s: float
    bottleneck: str
    measured_entities: int
    device: str


def estimate_export(config: ExportConfig) -> ExportEstimate:
    """Read the whole catalog and export a sample of it to a temporary folder.

    Raises `CatalogError`, `CheckpointError`, `EncoderSpecError`.
    """
    check_inputs(config)
    device = resolve_device(config.device)
    model = load_model(config, device)
    sample: Reservoir[EntityRecord] = Reservoir(_SAMPLE_ENTITIES)
    rejected = with_image = 0
    for item in tqdm(read_records(config), desc="reading", unit="record", disable=not config.progress):
        if isinstance(item, Rejected):
            rejected += 1
        else:
            sample.add(item)
            with_image += bool(item.images)
    if not sample.seen:
        raise CatalogError(f"{config.catalog} has no usable entity record; see the interface of catalogs in the docs")
    with TemporaryDirectory(prefix="plan.") as name:
        folder = Path(name)
        staging = StagingDir(folder)
        staging.begin({})
        measured, sampled, sampled_embeddings, stages_s = _export_sample(config, model, sample.items, staging)
        started = time.monotonic()
        write_store(folder / STORE_FILE, staging.entities())
        store_s = time.monotonic() - started
        store_bytes = (folder / STORE_FILE).stat().st_size
        work_bytes = sum(file.stat().st_size for file in (folder / STAGING_FOLDER / "shards").iterdir())
    entities, shards = sample.seen, -(-sample.seen // config.shard_size)
    embeddings = round(entities * (sampled_embeddings / sampled))
    encoder, dim = model.image_encoder, model.image_encoder.embedding_dim
    disk_bytes = {
        "embeddings": embeddings * (2 * dim + 8) + entities * HASH_BYTES + 3 * shards * _NPY_HEADER_BYTES,
        "index": embeddings * 4 * dim,
        "store": round(entities * (store_bytes / sampled)),
        "image encoder": stored_bytes(encoder, half=config.half),
    }
    if config.int8:
        disk_bytes["int8 encoder"] = stored_bytes(encoder, half=False) // 4
    if config.float16:
        disk_bytes["float16 encoder"] = stored_bytes(encoder, half=False) // 2
    seconds = {
        _STAGE_NAMES.get(stage, stage): round(entities * (stage_s / measured), 3) for stage, stage_s in stages_s.items()
    }
    seconds["store"] = round(entities * (store_s / sampled), 3)
    total_s = sum(seconds.values())
    return ExportEstimate(
        entities=entities,
        with_image=with_image,
        rejected=rejected,
        embeddings=embeddings,
        shards=shards,
        disk_bytes=disk_bytes,
        work_bytes=round(entities * (work_bytes / sampled)),
        seconds=seconds,
        total_s=round(total_s, 3),
        entities_per_s=round(entities / total_s, 2) if total_s else 0.0,
        bottleneck=max(seconds, key=seconds.__getitem__),
        measured_entities=measured,
        device=device.type,
    )


def _export_sample(
    config: ExportConfig, model: ExportModel, records: list[EntityRecord], staging: StagingDir
) -> tuple[int, int, int, dict[str, float]]:
    """Export the records as small shards, until they took long enough.

    The first shards warm up processes and memory. Return how many entities came after them, how many entities and
    embeddings there were in all, and the seconds of each stage without the first shards.
    """
    times = StageTimes()
    size = config.batch_size
    shards = [
        Shard(number=number, first_row=first, records=records[first : first + size], rejected=())
        for number, first in enumerate(range(0, len(records), size))
    ]
    warm_up = min(_WARM_UP_SHARDS, len(shards) // 2)
    measured = all_entities = embeddings = 0
    with (
        open_base(config, model) as base,
        tqdm(desc="sample", unit="entity", total=len(records), disable=not config.progress) as bar,
    ):
        started = time.monotonic()
        embedded_shards = embed_shards(config, model, shards, times, base=base)
        with closing(write_shards(config, model.text_encoder, staging, embedded_shards, times)) as written:
            for number, embedded in enumerate(written, start=1):
                count = len(embedded.records.entities)
                bar.update(count)
                all_entities += count
                embeddings += len(embedded.rows) + sum(len(copied_kD) for _, copied_kD in embedded.records.copied)
                if number > warm_up:
                    measured += count
                    if time.monotonic() - started > _MEASURED_S:
                        break
                elif number == warm_up:
                    times.seconds.clear()
                    started = time.monotonic()
    return measured, all_entities, embeddings, times.seconds


def estimate_lines(estimate: ExportEstimate, config: ExportConfig) -> list[str]:
    """Return an estimate as lines of text."""
    size, duration = tqdm.format_sizeof, tqdm.format_interval
    parts = ", ".join(f"{name} {size(each, 'B')}" for name, each in estimate.disk_bytes.items())
    lines = [
        f"{estimate.entities} entities, {estimate.with_image} with an image, {estimate.rejected} record(s) rejected; "
        f"about {estimate.embeddings} embeddings in {estimate.shards} shard(s) of {config.shard_size}",
        f"disk: {size(sum(estimate.disk_bytes.values()), 'B')} ({parts}), {size(estimate.work_bytes, 'B')} temporarily",
        f"time by stage, from {estimate.measured_entities} entities on {estimate.device}:",
    ]
    for stage, stage_s in estimate.seconds.items():
        lines.append(f"  {stage:<34}{1000 * stage_s / estimate.entities:10.2f} ms/entity{duration(stage_s):>14}")
    share = 100 * estimate.seconds[estimate.bottleneck] / estimate.total_s if estimate.total_s else 0.0
    lines.append(
        f"total about {duration(estimate.total_s)}, {estimate.entities_per_s:.1f} entities/s, without ONNX files; "
        f"bottleneck: {estimate.bottleneck} ({share:.0f} %)"
    )
    return lines
