"""What an export is told, what of it the bundle's content depends on, and what makes it impossible from the start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from catalog.images import TarImages
from core.errors import CatalogError, UserError
from core.files import sha256_file
from export.float16 import torch_module
from export.staging import foreign_files, is_unfinished
from index.manifest import MANIFEST_FILE
from model.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `wikiclip export` is told. `thumbnail_px` 0 stores no thumbnails; `limit` None takes the whole catalog."""

    catalog: Path
    checkpoint: Path
    out: Path
    resume: bool = False
    limit: int | None = None
    shard_size: int = 4096
    batch_size: int = 32
    validation: Path | None = None
    name: str | None = None  # default: the output folder's
    thumbnail_px: int = 0
    store_text: bool = False
    half: bool = True  # weights of the ONNX file in float16 where that moves no embedding
    int8: bool = False  # also a quantised file, for queries on a CPU
    float16: bool = False  # also a file that computes in float16, for queries on a GPU
    live: bool = False  # with what embeds entities that are put while serving
    image_root: Path | None = None
    images: Path | None = None  # tar shards that images named by URL are read from
    image_encoder: str | None = None
    text_encoder: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    base: Path | None = None  # a bundle from which unchanged entities are copied
    workers: int | None = None  # processes that decode images; default: one a core
    engine: Literal["local", "ray"] = "local"
    progress: bool = False


def load_checkpoint(config: ExportConfig, device: torch.device | str) -> Checkpoint:
    """The checkpoint with the encoders that the config names. Raises as `Checkpoint.load` does, and `EncoderSpecError`
    where the image encoder cannot be exported as the config says."""
    checkpoint = Checkpoint.load(
        config.checkpoint,
        image_encoder_spec=config.image_encoder,
        text_encoder_spec=config.text_encoder,
        device=device,
        trust_remote_code=config.trust_remote_code,
    )
    if config.float16:
        torch_module(checkpoint.image_encoder)
    return checkpoint


def check_inputs(config: ExportConfig) -> None:
    """Look for the input files before the models are loaded, which takes a while. Raises `CatalogError`."""
    if not config.catalog.is_file():
        raise CatalogError(f"{config.catalog} does not exist; check --catalog")
    if config.images is not None:
        TarImages(config.images)
    if config.validation is not None and not config.validation.is_file():
        raise CatalogError(f"{config.validation} does not exist; check --validation")
    if config.base is not None and config.base.resolve() == config.out.resolve():
        raise UserError(f"--base and --out are both {config.out}; a bundle never changes, choose another --out")
    check_image_root(config)


def check_image_root(config: ExportConfig) -> None:
    """Raise `CatalogError` where the folder of all images is not there, or not any more."""
    if config.image_root is not None and not config.image_root.is_dir():
        raise CatalogError(f"the image root {config.image_root} is not there; bring it back, or check --image-root")


def check_output(config: ExportConfig) -> None:
    """Refuse an output folder in which something else would be touched. Raises `UserError`."""
    out = config.out
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not config.resume and (out / MANIFEST_FILE).exists():
        raise UserError(f"--out {out} holds a bundle already, which never changes; choose another folder")
    if not config.resume and is_unfinished(out):
        raise UserError(f"--out {out} holds an unfinished export; finish it with --resume, or remove the folder")
    if not (out / MANIFEST_FILE).exists() and (files := foreign_files(out)):
        raise UserError(f"--out {out} is not empty (it holds {files[0]}); choose an empty or a new folder")


def content_settings(config: ExportConfig, checkpoint: Checkpoint, device: str) -> dict[str, Any]:
    """Everything that the bundle's content depends on, and no path."""
    return {
        "catalog_sha256": sha256_file(config.catalog),
        "checkpoint_sha256": checkpoint.sha256,
        "limit": config.limit,
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "thumbnail_px": config.thumbnail_px,
        "store_text": config.store_text,
        "half": config.half,
        "int8": config.int8,
        **({"float16": True} if config.float16 else {}),  # a bundle without keeps the fingerprint it always had
        "device": device,
        "validation_sha256": None if config.validation is None else sha256_file(config.validation),
    }


def refuse_differences(
    out: Path, begun: Mapping[str, Any], wanted: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Raise `UserError` where an export that was begun is not the one wanted now."""
    begun, wanted = ({"int8": False, "float16": False, **settings} for settings in (begun, wanted))
    differing = [key for key in wanted if key not in ignored and begun.get(key) != wanted[key]]
    if differing:
        names = ", ".join(key.removesuffix("_sha256").replace("_", " ") for key in differing)
        raise UserError(f"{out} was made with another {names}; resume with the same, or choose another --out")


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """The manifest's `model`: which encoders and adaptor made the embeddings."""
    described = checkpoint.describe()
    return {
        "image_encoder": described["image_encoder"]["spec"],
        "text_encoder": described["text_encoder"]["spec"],
        "image_encoder_hash": checkpoint.image_encoder.content_hash,
        "text_encoder_hash": checkpoint.text_encoder.content_hash,
        "adaptor": described["adaptor"],
        "checkpoint_sha256": checkpoint.sha256,
        "logit_scale": checkpoint.logit_scale,
    }
