"""Catalog and checkpoint in, bundle out, restartable at any moment.

Shards are finished one by one; then everything that depends on all of them is written in one go, so that an export that
was killed and resumed gives the bytes of one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from core.errors import UserError
from core.files import report_disk_full
from export.assemble import assemble, rejects_path
from export.config import (
    ExportConfig,
    check_inputs,
    check_output,
    content_settings,
    load_checkpoint,
    refuse_differences,
)
from export.embed_catalog import Outcome, embed_catalog
from export.entity_encoder import export_entity_encoder
from export.float16 import add_float16
from export.onnx_export import export_image_encoder
from export.staging import StagingDir, is_unfinished
from export.stream import StageTimes
from index.bundle import Bundle
from index.entity_encoder import EntityEncoder
from index.manifest import FLOAT16_ENCODER_FILE, MANIFEST_FILE, Counts, Float16Entry, Int8Entry
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
    int8: Int8Entry | None
    float16: Float16Entry | None
    rejects: str
    elapsed_s: float
    copied_entities: int = 0  # from the base
    base_fits: bool = True  # false where nothing could be copied, since other models or thumbnails made it
    stages_s: dict[str, float] = field(default_factory=dict)  # seconds in which nothing else went on in the main thread


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
    checkpoint = load_checkpoint(config, device)
    settings = content_settings(config, checkpoint, device.type)
    if (config.out / MANIFEST_FILE).exists():
        return _already_complete(config, checkpoint, settings, started)
    spool = StagingDir(config.out)
    with spool.held():
        _check_settings(config, spool, settings)
        outcome = None
        times = StageTimes()
        if not spool.is_ready_to_publish:
            with report_disk_full(config.out, again="go on with --resume"):
                if spool.parity() is None:
                    with times.measure("ONNX files"), _files(config, "image encoder", 1) as bar:
                        parity = export_image_encoder(
                            checkpoint.image_encoder,
                            spool.bundle,
                            half=config.half,
                            centre_D=checkpoint.adaptor.centre_D,
                        )
                        bar.update()
                    spool.finish_image_encoder(parity)
                spool.discard(FLOAT16_ENCODER_FILE)
                float16 = None
                if config.float16:  # before the shards: an encoder that does not bear it is told of soon
                    with times.measure("ONNX files"), _files(config, "float16", 1) as bar:
                        float16 = add_float16(checkpoint.image_encoder, spool.bundle, checkpoint.adaptor.centre_D)
                        bar.update()
                outcome = embed_catalog(config, checkpoint, spool, times)
                with times.measure("store, index, manifest"):
                    assemble(config, checkpoint, spool, settings, started, outcome.sample, float16)
        spool.publish()
    _add_entity_encoder(config, checkpoint)
    return _summary(config, started, outcome, times)


def _check_settings(config: ExportConfig, spool: StagingDir, settings: Mapping[str, Any]) -> None:
    """Begin, or make sure that what was begun is the same export."""
    image_root = None if config.image_root is None else str(config.image_root.resolve())
    base = None if config.base is None else Bundle.open(config.base).fingerprint
    begun = spool.settings()
    images = None if config.images is None else str(config.images.resolve())
    wanted = {**settings, "image_root": image_root, "images": images, "base": base}
    if begun is None:
        spool.begin(wanted)
        return
    # No shard depends on them: they may be given, changed or left out when an export is taken up again.
    refuse_differences(config.out, begun, wanted, ignored={"validation_sha256", "int8", "float16"})


def _already_complete(
    config: ExportConfig, checkpoint: Checkpoint, settings: Mapping[str, Any], started: float
) -> ExportSummary:
    bundle = Bundle.open(config.out)
    refuse_differences(config.out, bundle.manifest.export, settings)
    if config.name is not None and config.name != bundle.name:
        raise UserError(f"{config.out} holds a bundle named {bundle.name}; leave --name out, or choose another --out")
    if is_unfinished(config.out):  # killed after the manifest was in place: only the clearing up is left
        spool = StagingDir(config.out)
        with spool.held():
            spool.remove()
    _add_entity_encoder(config, checkpoint)
    return _summary(config, started, None, StageTimes(), already_complete=True)


def _add_entity_encoder(config: ExportConfig, checkpoint: Checkpoint) -> None:
    """The last step: like the index it is no part of the bundle's identity, so a finished bundle may be given it."""
    if config.live and EntityEncoder.open(config.out, checkpoint.sha256) is None:
        again = "go on with --resume"
        with report_disk_full(config.out, again=again), _files(config, "entity side", 2) as bar:
            export_entity_encoder(checkpoint, config.out, on_file=bar.update)


def _files(config: ExportConfig, name: str, total: int) -> tqdm[Any]:
    return tqdm(desc=name, unit="file", total=total, disable=not config.progress)


def _summary(
    config: ExportConfig, started: float, outcome: Outcome | None, times: StageTimes, *, already_complete: bool = False
) -> ExportSummary:
    bundle = Bundle.open(config.out)
    counts = bundle.manifest.counts
    shards = sum(name.endswith(".rows.npy") for name in bundle.manifest.files)
    rejects = rejects_path(config.out)
    return ExportSummary(
        bundle=str(config.out),
        fingerprint=bundle.fingerprint,
        counts=counts,
        shards=shards,
        resumed_shards=0 if outcome is None else outcome.resumed_shards,
        already_complete=already_complete,
        calibrated=bundle.calibration is not None,
        int8=bundle.manifest.image_encoder.int8,
        float16=bundle.manifest.image_encoder.float16,
        rejects=str(rejects) if rejects.exists() else "",
        elapsed_s=round(time.perf_counter() - started, 3),
        copied_entities=0 if outcome is None else outcome.copied_entities,
        base_fits=outcome is None or config.base is None or outcome.base_fits,
        stages_s={stage: round(seconds, 3) for stage, seconds in times.seconds.items()},
    )
