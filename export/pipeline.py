"""The export: catalog and checkpoint in, bundle out, resumable at any moment.

Shards are written one by one. Everything that depends on all shards is written in one pass at the end, so a resumed
export has the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from tqdm import tqdm

from catalog.formats import count_hint
from core.errors import CatalogError, UserError
from core.files import report_disk_full
from core.lines import RejectLog, rejects_path
from core.statistics import Reservoir
from export.config import (
    ExportConfig,
    check_inputs,
    content_settings,
    read_type_parents,
    refuse_differences,
)
from export.entity_encoder import export_entity_encoder
from export.leave_one_out import check_catalog, choose_pooling, own_queries, pooling_folds
from export.local import embed_shards
from export.model import ExportModel, ImageModel, describe_model, load_model
from export.onnx import INPUT, export_image_encoder, output_names
from export.precision import add_float16, measure_int8, write_int8
from export.queries import LabelledQueries, QueryEmbeddings, embed_validation
from export.remember import remember
from export.reuse import copy_image_encoder, open_base
from export.shards import EntityImages, Shard, StageTimes, read_shards
from export.staging import StagingDir, check_output, is_unfinished, write_shards
from export.views import calibrate_on
from index.build import build_index
from index.bundle import Bundle, list_files
from index.calibration import Calibration
from index.embeddings import EmbeddingShards, Pooling, pooled
from index.manifest import (
    FLOAT16_ENCODER_FILE,
    IMAGE_ENCODER_FILE,
    INDEX_FILE,
    INT8_ENCODER_FILE,
    MANIFEST_FILE,
    OPEN_SET_FILE,
    REMEMBERED_FOLDER,
    STORE_FILE,
    Counts,
    EntityEncoder,
    Float16Entry,
    ImageEncoderEntry,
    Int8Entry,
    Manifest,
    RememberedEntry,
    SelfCheck,
    schema_version,
)
from index.search import EntityIndex
from index.store import EntityStore, write_store
from model.encoders import resolve_device

SAMPLED_ENTITIES = 512  # with images, to calibrate and judge the int8 encoder
_RESUME = "go on with --resume"


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export made or found. `rejects` is the path of the reject log, or empty."""

    bundle: str
    fingerprint: str
    counts: Counts
    shards: int
    resumed_shards: int
    already_complete: bool
    calibrated: bool
    pooling: Pooling
    remembered: RememberedEntry | None
    self_check: SelfCheck | None  # without checkpoint and validation queries
    int8: Int8Entry | None
    float16: Float16Entry | None
    trained: bool  # false without a checkpoint: entities without an image have no embedding
    added_entity_encoder: bool  # by this run
    rejects: str
    elapsed_s: float
    copied_entities: int = 0  # from the base
    base_fits: bool = True  # false if nothing could be copied from the base
    stages_s: dict[str, float] = field(default_factory=dict)  # of the main thread, one after the other


@dataclass(kw_only=True)
class _Embedded:
    """The result of embedding the catalog."""

    resumed_shards: int = 0
    copied_entities: int = 0
    base_fits: bool = True
    sample: Reservoir[EntityImages] = field(default_factory=lambda: Reservoir(SAMPLED_ENTITIES))  # of the whole catalog


def export_bundle(config: ExportConfig) -> ExportSummary:
    """Write a bundle with an exact index to `config.out`, and rejects to `rejected.jsonl` next to it.

    After an interruption, the same call with `resume` finishes it. Raises `UserError` if the output has other files, an
    unfinished export without `resume`, or one with other settings; `CatalogError`, `CheckpointError`,
    `EncoderSpecError`. Finished work is kept after any error.
    """
    started = time.perf_counter()
    check_inputs(config)
    check_output(config.out, resume=config.resume)
    device = resolve_device(config.device)
    model = load_model(config, device)
    settings = content_settings(
        config,
        checkpoint_sha256=model.sha256,
        image_encoder_hash=model.image_encoder.content_hash,
        device=device.type,
    )
    staging, times, embedded = StagingDir(config.out), StageTimes(), _Embedded()
    already_complete = (config.out / MANIFEST_FILE).exists()
    if already_complete:
        _check_complete(config, settings)
    else:
        with staging.locked():
            _begin_or_resume(config, staging, settings)
            if not staging.is_ready_to_publish:
                with report_disk_full(config.out, again=_RESUME):
                    float16 = _write_encoders(config, model, staging, times)
                    embedded = _embed_catalog(config, model, staging, times)
                    with times.measure("store, index, manifest"):
                        _assemble(config, model, staging, settings, started, embedded.sample.items, float16)
            staging.publish()
    added_entity_encoder = _add_entity_encoder(config, model)
    bundle, rejects = Bundle.open(config.out), rejects_path(config.out)
    return ExportSummary(
        bundle=str(config.out),
        fingerprint=bundle.fingerprint,
        counts=bundle.manifest.counts,
        shards=sum(name.endswith(".rows.npy") for name in bundle.manifest.files),
        resumed_shards=embedded.resumed_shards,
        already_complete=already_complete,
        calibrated=bundle.calibration is not None,
        pooling=bundle.manifest.pooling,
        remembered=bundle.manifest.remembered,
        self_check=bundle.manifest.self_check,
        int8=bundle.manifest.image_encoder.int8,
        float16=bundle.manifest.image_encoder.float16,
        trained=config.checkpoint is not None,
        added_entity_encoder=added_entity_encoder,
        rejects=str(rejects) if rejects.exists() else "",
        elapsed_s=round(time.perf_counter() - started, 3),
        copied_entities=embedded.copied_entities,
        base_fits=embedded.base_fits,
        stages_s={stage: round(seconds, 3) for stage, seconds in times.seconds.items()},
    )


def _check_complete(config: ExportConfig, settings: Mapping[str, Any]) -> None:
    """Raise `UserError` if the complete bundle was made with other settings. Delete what is left of its staging."""
    bundle = Bundle.open(config.out)
    refuse_differences(config.out, bundle.manifest.export, settings)
    if config.name is not None and config.name != bundle.name:
        raise UserError(f"{config.out} has a bundle named {bundle.name}; omit --name, or choose another --out")
    if is_unfinished(config.out):  # killed between moving the manifest and deleting the staging folder
        staging = StagingDir(config.out)
        with staging.locked():
            staging.remove()


def _begin_or_resume(config: ExportConfig, staging: StagingDir, settings: Mapping[str, Any]) -> None:
    """Store the settings, or raise `UserError` if the export was begun with others."""
    current = {
        **settings,
        "image_root": None if config.image_root is None else str(config.image_root.resolve()),
        "images": None if config.images is None else str(config.images.resolve()),
        "base": None if config.base is None else Bundle.open(config.base).fingerprint,
    }
    earlier = staging.settings()
    if earlier is None:
        staging.begin(current)
    else:  # shards do not depend on the ignored settings
        ignored = {"validation_sha256", "remember_sha256", "type_parents_sha256", "int8", "float16"}
        refuse_differences(config.out, earlier, current, ignored)


def _write_encoders(
    config: ExportConfig, model: ExportModel, staging: StagingDir, times: StageTimes
) -> Float16Entry | None:
    """Write the ONNX files of the image encoder before the shards, so that a failure is noticed early."""
    encoder, centre_D = model.image_encoder, model.centre
    if staging.parity() is None:
        with times.measure("ONNX files"), _progress(config, "image encoder"):
            parity = copy_image_encoder(config, model, staging.bundle) or export_image_encoder(
                encoder, staging.bundle, half=config.half, centre_D=centre_D
            )
        staging.finish_image_encoder(parity)
    staging.discard(FLOAT16_ENCODER_FILE)
    if not config.float16:
        return None
    with times.measure("ONNX files"), _progress(config, "float16"):
        return add_float16(encoder, staging.bundle, centre_D)


def _embed_catalog(config: ExportConfig, model: ExportModel, staging: StagingDir, times: StageTimes) -> _Embedded:
    """Embed and write every shard that is not finished yet. Raises `CatalogError` if the catalog has no entity."""
    result = _Embedded()
    finished_entities = 0
    total = config.limit or (count_hint(config.catalog) if config.progress else None)
    bar = tqdm(desc="entities", unit="entity", total=total, disable=not config.progress)
    with bar, open_base(config, model) as base:
        result.base_fits = config.base is None or base is not None

        def unfinished() -> Iterator[Shard]:
            nonlocal finished_entities
            for shard in read_shards(config):
                for row, record in enumerate(shard.records, shard.first_row):
                    if record.images:
                        result.sample.add((row, tuple(record.images)))
                if staging.has_shard(shard.number):
                    result.resumed_shards += 1
                    finished_entities += len(shard.records)
                else:
                    yield shard

        def advance(count: int) -> None:
            bar.update(max(0, count - bar.n))

        if config.engine == "ray":
            from export.ray import embed_shards_on_ray

            numbers = [shard.number for shard in unfinished()]
            shards = embed_shards_on_ray(config, model, numbers, copy_from_base=base is not None)
        else:
            shards = embed_shards(config, model, unfinished(), times, base=base, on_row=lambda row: advance(row + 1))
        for embedded in write_shards(config, model.text_encoder, staging, shards, times):
            result.copied_entities += len(embedded.records.copied)
            finished_entities += len(embedded.records.entities)
            advance(finished_entities)
    if finished_entities == 0:
        staging.remove()
        raise CatalogError(f"{config.catalog} has no usable entity record; see the interface of catalogs in the docs")
    if len(EmbeddingShards(staging.embeddings, model.image_encoder.embedding_dim)) == 0:  # only without a checkpoint
        rejects = rejects_path(config.out)
        _count_and_log(staging, _reject_log(config), 0)
        staging.remove()
        why = f"{rejects} has the reasons" if rejects.exists() else "no record names an image"
        raise CatalogError(f"{config.catalog}: no entity has a usable image, and nothing else is embedded; {why}")
    return result


def _assemble(
    config: ExportConfig,
    model: ExportModel,
    staging: StagingDir,
    settings: Mapping[str, Any],
    started: float,
    sample: Sequence[EntityImages],
    float16: Float16Entry | None,
) -> None:
    """Write everything that needs all shards: store, index, remembered vectors, calibration, int8 encoder, reject log.

    The manifest is written last.
    """
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    parity = staging.parity()
    assert parity is not None, "the image encoder is written before the shards"
    bundle, encoder = staging.bundle, model.image_encoder
    for file in (INT8_ENCODER_FILE, OPEN_SET_FILE):
        staging.discard(file)
    shutil.rmtree(bundle / REMEMBERED_FOLDER, ignore_errors=True)
    images = EmbeddingShards(staging.embeddings, encoder.embedding_dim)
    log = _reject_log(config)
    counts = _count_and_log(staging, log, len(images))
    types = read_type_parents(config.type_parents_file, log.add)
    entities = tqdm(staging.entities(), desc="store", unit="entity", disable=not config.progress)
    write_store(bundle / STORE_FILE, entities, types)
    validation: LabelledQueries | None = None
    calibration: Calibration | None = None
    self_check: SelfCheck | None = None
    int8: Int8Entry | None = None
    remembered: RememberedEntry | None = None
    with EntityStore(bundle / STORE_FILE) as store:
        # Before the queries are read: embeddings by the int8 encoder may be among them.
        quantised = write_int8(config, model, bundle, sample) if config.int8 else None
        embeddings = QueryEmbeddings(model, bundle)
        if config.validation is not None:
            validation = embed_validation(config.validation, config, model, store, embeddings, log.add)
        pooling = choose_pooling(
            images,
            pooling_folds(config, model, images, sample, validation),
            default="nearest" if config.checkpoint else "mean",
            progress=config.progress,
        )
        searched = pooled(images, pooling)
        index_manifest = build_index(bundle, searched, device="cpu", created_at=created_at, progress=config.progress)
        index = EntityIndex.read(bundle / INDEX_FILE, searched, index_manifest.parameters)
        if config.remember is not None:
            folder = bundle / REMEMBERED_FOLDER
            kept = remember(
                config.remember, folder, config, model, images, index, store, log, validation, embeddings
            )  # fmt: skip
            if kept is not None:
                index.remembered, remembered = kept
        if validation is not None:
            calibration = calibrate_on(validation, config, model, index, store)
        elif isinstance(model, ImageModel):
            queries = own_queries(config, model, images, sample)
            self_check, calibration = check_catalog(queries, config, model, index, images, pooling, store)
        if calibration is not None and calibration.open_set_model is not None:
            calibration.open_set_model.write(bundle / OPEN_SET_FILE)
        if quantised is not None:
            int8 = measure_int8(config, model, bundle, quantised, index, store)
    entry = ImageEncoderEntry(
        file=IMAGE_ENCODER_FILE,
        input=INPUT,
        outputs=output_names(encoder),
        parity=asdict(parity),
        int8=int8,
        float16=float16,
    )
    preprocessing = encoder.preprocessing.to_dict()
    Manifest(
        schema_version=schema_version(entry, preprocessing, pooling, remembered),
        name=config.name or config.out.resolve().name,
        model=describe_model(model),
        preprocessing=preprocessing,
        embedding_dim=encoder.embedding_dim,
        patches=encoder.patches,
        counts=counts,
        calibration=None if calibration is None else calibration.to_dict(),
        image_encoder=entry,
        pooling=pooling,
        remembered=remembered,
        self_check=self_check,
        export=settings,
        files=list_files(bundle),
        created_at=created_at,
        elapsed_s=round(time.perf_counter() - started, 3),
    ).write(bundle / MANIFEST_FILE)


def _count_and_log(staging: StagingDir, log: RejectLog, embeddings: int) -> Counts:
    counts: Counter[str] = Counter(embeddings=embeddings)
    for shard in staging.shards():
        counts.update(
            entities=len(shard.entities),
            without_image=sum(entity.image_count == 0 for entity, _ in shard.entities),
            without_text=sum(not entity.has_text for entity, _ in shard.entities),
            rejected=len(shard.rejected),
            images_failed=len(shard.images_failed),
        )
        for item in sorted((*shard.rejected, *shard.images_failed), key=lambda item: item.line):
            log.add(item)
    return Counts(**counts)


def _add_entity_encoder(config: ExportConfig, model: ExportModel) -> bool:
    """Add the entity encoder, which is not part of the bundle's identity, to a finished bundle. Return whether it did.

    Without a checkpoint, the image encoder embeds entities, and there is nothing to add.
    """
    if not config.live or isinstance(model, ImageModel) or EntityEncoder.open(config.out, model.sha256) is not None:
        return False
    with report_disk_full(config.out, again=_RESUME), _progress(config, "entity encoder"):
        export_entity_encoder(model, config.out)
    return True


@contextmanager
def _progress(config: ExportConfig, step: str) -> Iterator[None]:
    with tqdm(desc=step, unit="step", total=1, disable=not config.progress) as bar:
        yield
        bar.update()


def _reject_log(config: ExportConfig) -> RejectLog:
    log = RejectLog(rejects_path(config.out))
    for rejected in config.rejected:
        log.add(rejected)
    return log
