"""Catalog and checkpoint in, bundle out, restartable at any moment.

Shards are finished one by one; then everything that depends on all of them is written in one go, so that an export that
was killed and resumed gives the bytes of one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from catalog import EntityRecord, read_catalog
from core.errors import CatalogError, UserError
from core.jsonl import Rejected, RejectLog
from export.config import ExportConfig, check_inputs, check_output, content_settings, refuse_differences
from export.embed import ShardEmbedder
from export.onnx_export import INPUT, OUTPUTS, export_image_encoder
from export.spool import Spool, SpooledShard, is_unfinished
from export.validation import calibrate
from index.build import build_index
from index.bundle import Bundle, list_files
from index.calibration import Calibration
from index.embeddings import EmbeddingShards, write_shard
from index.manifest import (
    IMAGE_ENCODER_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    STORE_FILE,
    Counts,
    ImageEncoderEntry,
    Manifest,
)
from index.search import EntityIndex
from index.store import EntityStore, write_store
from model.checkpoint import Checkpoint
from model.encoders import resolve_device


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export made, or found: `resumed_shards` were there already, `rejects` names the log if there is one."""

    bundle: str
    fingerprint: str
    counts: Counts
    shards: int
    resumed_shards: int
    already_complete: bool
    calibrated: bool
    rejects: str
    elapsed_s: float


def export_bundle(config: ExportConfig) -> ExportSummary:
    """Write a servable bundle to `config.out`, with an exact index; catalog rejects go to `rejected.jsonl` beside it.

    Killed at any moment, the same call with `resume` finishes it. Raises `UserError` where the output holds a bundle
    or an unfinished one and `resume` is not set, or where it was begun with other settings; `CatalogError`,
    `CheckpointError`, `EncoderSpecError`. What is finished stays, whatever fails.
    """
    started = time.perf_counter()
    check_inputs(config)
    check_output(config)
    device = resolve_device(config.device)
    checkpoint = Checkpoint.load(
        config.checkpoint,
        image_encoder_spec=config.image_encoder,
        text_encoder_spec=config.text_encoder,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    settings = content_settings(config, checkpoint, device.type)
    if (config.out / MANIFEST_FILE).exists():
        return _already_complete(config, settings, started)
    spool = Spool(config.out)
    with spool.held():
        _check_settings(config, spool, settings)
        resumed = 0
        if not spool.is_ready_to_publish:
            if spool.parity() is None:
                parity = export_image_encoder(checkpoint.image_encoder, spool.bundle, half=config.half)
                spool.finish_image_encoder(parity)
            resumed = _embed_catalog(config, checkpoint, spool)
            _assemble(config, checkpoint, spool, settings, started)
        spool.publish()
    return _summary(config, started, resumed_shards=resumed)


def _check_settings(config: ExportConfig, spool: Spool, settings: Mapping[str, Any]) -> None:
    """Begin, or make sure that what was begun is the same export."""
    image_root = None if config.image_root is None else str(config.image_root.resolve())
    begun = spool.settings()
    wanted = {**settings, "image_root": image_root}
    if begun is None:
        spool.begin(wanted)
        return
    # Validation comes after the shards: it may be given, changed or left out when an export is taken up again.
    refuse_differences(config.out, begun, wanted, ignored={"validation_sha256"})


def _already_complete(config: ExportConfig, settings: Mapping[str, Any], started: float) -> ExportSummary:
    bundle = Bundle.open(config.out)
    refuse_differences(config.out, bundle.manifest.export, settings)
    if config.name is not None and config.name != bundle.name:
        raise UserError(f"{config.out} holds a bundle named {bundle.name}; leave --name out, or choose another --out")
    if is_unfinished(config.out):  # killed after the manifest was in place: only the clearing up is left
        spool = Spool(config.out)
        with spool.held():
            spool.remove()
    return _summary(config, started, already_complete=True)


def _embed_catalog(config: ExportConfig, checkpoint: Checkpoint, spool: Spool) -> int:
    """Finish every shard that is not; returns how many were."""
    embedder = ShardEmbedder(
        checkpoint,
        batch_size=config.batch_size,
        thumbnail_px=config.thumbnail_px,
        store_text=config.store_text,
    )
    resumed = first_row = 0
    with tqdm(desc="entities", unit="entity", total=config.limit, disable=not config.progress) as bar:
        for number, (records, rejected) in enumerate(_shards(config)):
            if spool.has_shard(number):
                resumed += 1
            else:
                shard = embedder.embed(records, first_row)
                write_shard(spool.embeddings, number, shard.rows_n, shard.embeddings_nD)
                spool.finish_shard(
                    number,
                    SpooledShard(entities=shard.entities, rejected=rejected, images_failed=shard.images_failed),
                )
            first_row += len(records)
            bar.update(len(records))
    if first_row == 0:
        spool.remove()  # nothing was made that could be taken up again
        raise CatalogError(f"{config.catalog} holds no usable entity record; see the interface of catalogs in the docs")
    return resumed


def _shards(config: ExportConfig) -> Iterator[tuple[list[EntityRecord], list[Rejected]]]:
    """The catalog in shards; a bad record goes with the shard in which it stands."""
    records: list[EntityRecord] = []
    rejected: list[Rejected] = []
    for item in _limited(read_catalog(config.catalog, config.image_root), config.limit):
        if isinstance(item, Rejected):
            rejected.append(item)
            continue
        records.append(item)
        if len(records) == config.shard_size:
            yield records, rejected
            records, rejected = [], []
    if records or rejected:
        yield records, rejected


def _limited(items: Iterator[EntityRecord | Rejected], limit: int | None) -> Iterator[EntityRecord | Rejected]:
    """The items up to the last of `limit` entities; nothing after it is even read."""
    taken = 0
    while (limit is None or taken < limit) and (item := next(items, None)) is not None:
        yield item
        taken += isinstance(item, EntityRecord)


def _assemble(
    config: ExportConfig, checkpoint: Checkpoint, spool: Spool, settings: Mapping[str, Any], started: float
) -> None:
    """Write what needs all shards: store, index, calibration, reject log; the manifest last."""
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    parity = spool.parity()
    assert parity is not None, "the image encoder comes before the shards"
    write_store(spool.bundle / STORE_FILE, spool.entities())
    encoder = checkpoint.image_encoder
    embeddings = EmbeddingShards(spool.embeddings, encoder.embedding_dim)
    index_manifest = build_index(spool.bundle, embeddings, device="cpu", created_at=created_at)
    log = RejectLog(_rejects_path(config.out))
    counts = _count_and_log(spool, log, len(embeddings))
    calibration: Calibration | None = None
    if config.validation is not None:
        index = EntityIndex.read(spool.bundle / INDEX_FILE, embeddings, index_manifest.parameters)
        with EntityStore(spool.bundle / STORE_FILE) as store:
            calibration, unusable = calibrate(config.validation, encoder, index, store, batch_size=config.batch_size)
        for rejected in unusable:
            log.add(rejected)
    described = checkpoint.describe()
    Manifest(
        schema_version=SCHEMA_VERSION,
        name=config.name or config.out.resolve().name,
        model={
            "image_encoder": described["image_encoder"]["spec"],
            "text_encoder": described["text_encoder"]["spec"],
            "image_encoder_hash": encoder.content_hash,
            "text_encoder_hash": checkpoint.text_encoder.content_hash,
            "adaptor": described["adaptor"],
            "checkpoint_sha256": checkpoint.sha256,
            "logit_scale": checkpoint.logit_scale,
        },
        preprocessing=encoder.preprocessing.to_dict(),
        embedding_dim=encoder.embedding_dim,
        patches=encoder.patches,
        counts=counts,
        calibration=None if calibration is None else calibration.to_dict(),
        image_encoder=ImageEncoderEntry(
            file=IMAGE_ENCODER_FILE,
            input=INPUT,
            outputs=OUTPUTS,
            parity={"max_abs_diff": parity.max_abs_diff, "min_cosine": parity.min_cosine},
        ),
        export=settings,
        files=list_files(spool.bundle),
        created_at=created_at,
        elapsed_s=round(time.perf_counter() - started, 3),
    ).write(spool.bundle / MANIFEST_FILE)


def _count_and_log(spool: Spool, log: RejectLog, embeddings: int) -> Counts:
    entities = without_image = without_text = rejected = images_failed = 0
    for shard in spool.shards():
        entities += len(shard.entities)
        without_image += sum(entity.image_count == 0 for entity, _ in shard.entities)
        without_text += sum(not entity.has_text for entity, _ in shard.entities)
        rejected += len(shard.rejected)
        images_failed += len(shard.images_failed)
        for item in sorted((*shard.rejected, *shard.images_failed), key=lambda item: item.line):
            log.add(item)
    return Counts(
        entities=entities,
        embeddings=embeddings,
        without_image=without_image,
        without_text=without_text,
        rejected=rejected,
        images_failed=images_failed,
    )


def _summary(
    config: ExportConfig, started: float, *, resumed_shards: int = 0, already_complete: bool = False
) -> ExportSummary:
    bundle = Bundle.open(config.out)
    counts = bundle.manifest.counts
    shards = sum(name.endswith(".rows.npy") for name in bundle.manifest.files)
    rejects = _rejects_path(config.out)
    return ExportSummary(
        bundle=str(config.out),
        fingerprint=bundle.fingerprint,
        counts=counts,
        shards=shards,
        resumed_shards=resumed_shards,
        already_complete=already_complete,
        calibrated=bundle.calibration is not None,
        rejects=str(rejects) if rejects.exists() else "",
        elapsed_s=round(time.perf_counter() - started, 3),
    )


def _rejects_path(out: Path) -> Path:
    """Beside the bundle, for a bundle holds nothing but what a service needs."""
    return out.resolve().parent / "rejected.jsonl"
