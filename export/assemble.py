"""What needs all shards of an export: the store, the index, confidence, the reject log; and the manifest, last."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from core.jsonl import RejectLog
from export.calibrate import calibrate
from export.config import ExportConfig, describe_model
from export.int8 import add_int8
from export.onnx_export import INPUT, OUTPUTS
from export.sample import CatalogImages
from export.staging import StagingDir
from index.build import build_index
from index.bundle import list_files
from index.calibration import Calibration
from index.embeddings import EmbeddingShards
from index.manifest import (
    IMAGE_ENCODER_FILE,
    INDEX_FILE,
    INT8_ENCODER_FILE,
    MANIFEST_FILE,
    OPEN_SET_FILE,
    SCHEMA_VERSION,
    STORE_FILE,
    Counts,
    Float16Entry,
    ImageEncoderEntry,
    Int8Entry,
    Manifest,
)
from index.search import EntityIndex
from index.store import EntityStore, write_store
from model.checkpoint import Checkpoint


def assemble(
    config: ExportConfig,
    checkpoint: Checkpoint,
    spool: StagingDir,
    settings: Mapping[str, Any],
    started: float,
    sample: Sequence[CatalogImages],
    float16: Float16Entry | None,
) -> None:
    """Write what needs all shards: store, index, calibration, the int8 encoder, reject log; the manifest last.

    `float16` is what the manifest says of the encoder in float16, which is there already.
    """
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    parity = spool.parity()
    assert parity is not None, "the image encoder comes before the shards"
    hidden = not config.progress
    write_store(spool.bundle / STORE_FILE, tqdm(spool.entities(), desc="store", unit="entity", disable=hidden))
    encoder = checkpoint.image_encoder
    embeddings = EmbeddingShards(spool.embeddings, encoder.embedding_dim)
    index_manifest = build_index(
        spool.bundle, embeddings, device="cpu", created_at=created_at, progress=config.progress
    )
    log = RejectLog(rejects_path(config.out))
    counts = _count_and_log(spool, log, len(embeddings))
    calibration: Calibration | None = None
    int8: Int8Entry | None = None
    spool.discard(INT8_ENCODER_FILE)
    spool.discard(OPEN_SET_FILE)
    if config.validation is not None or config.int8:
        index = EntityIndex.read(spool.bundle / INDEX_FILE, embeddings, index_manifest.parameters)
        with EntityStore(spool.bundle / STORE_FILE) as store:
            if config.validation is not None:
                calibration, unusable = calibrate(
                    config.validation,
                    checkpoint,
                    index,
                    store,
                    batch_size=config.batch_size,
                    progress=config.progress,
                )
                if calibration.open_set_model is not None:
                    calibration.open_set_model.write(spool.bundle / OPEN_SET_FILE)
                for rejected in unusable:
                    log.add(rejected)
            if config.int8:
                int8 = add_int8(config, checkpoint, spool.bundle, sample, index, store)
    Manifest(
        schema_version=SCHEMA_VERSION,
        name=config.name or config.out.resolve().name,
        model=describe_model(checkpoint),
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
            int8=int8,
            float16=float16,
        ),
        export=settings,
        files=list_files(spool.bundle),
        created_at=created_at,
        elapsed_s=round(time.perf_counter() - started, 3),
    ).write(spool.bundle / MANIFEST_FILE)


def _count_and_log(spool: StagingDir, log: RejectLog, embeddings: int) -> Counts:
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


def rejects_path(out: Path) -> Path:
    """Beside the bundle, for a bundle holds nothing but what a service needs."""
    return out.resolve().parent / "rejected.jsonl"
