"""The options of an export, checks of its input files, and the settings that the bundle's content depends on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from catalog.formats import types_path
from catalog.images import ImageReader
from catalog.records import BadRecord, optional_string, required_string, strings
from core.errors import CatalogError, UserError
from core.files import sha256_file
from core.lines import Rejected, excerpt, read_jsonl
from index.types import TypeHierarchy, TypeParents


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options of `wikiclip export`."""

    catalog: Path
    out: Path
    checkpoint: Path | None = None  # None: the image encoder alone
    resume: bool = False
    limit: int | None = None  # None: the whole catalog
    shard_size: int = 4096
    batch_size: int = 32
    validation: Path | None = None
    validation_made_up: bool = False  # its queries are changed copies of the catalog's images
    remember: Path | None = None  # labelled pictures to keep as reference vectors
    type_parents: Path | None = None  # None: the file that `wikiclip catalog` wrote next to the catalog, if any
    name: str | None = None  # None: the name of the output folder
    thumbnail_px: int = 0  # 0: no thumbnails
    store_text: bool = False
    half: bool = True  # store the ONNX weights in float16 if that changes no embedding
    int8: bool = False
    float16: bool = False
    live: bool = False  # also write the entity encoder
    image_root: Path | None = None
    images: Path | None = None  # folder of tar shards, for images by URL
    image_encoder: str | None = None
    text_encoder: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    base: Path | None = None  # bundle from which unchanged entities are copied
    workers: int | None = None  # decoding processes; None: one per core
    engine: Literal["local", "ray"] = "local"
    progress: bool = False
    rejected: tuple[Rejected, ...] = ()  # by whatever built the catalog, to be written to the reject log first

    @property
    def type_parents_file(self) -> Path | None:
        if self.type_parents is None and (found := types_path(self.catalog)).is_file():
            return found
        return self.type_parents


def check_inputs(config: ExportConfig) -> None:
    """Check that the input files exist, before the models are loaded. Raises `CatalogError`, `UserError`."""
    if config.checkpoint is None and config.image_encoder is None:
        raise UserError("give --checkpoint, or --image-encoder to export without training")
    if config.checkpoint is None and config.text_encoder is not None:
        raise UserError("--text-encoder needs --checkpoint: without training, texts are not embedded; leave it out")
    files = (config.catalog, config.validation, config.remember, config.type_parents)
    for flag, file in zip(("--catalog", "--validation", "--remember", "--type-parents"), files, strict=True):
        if file is not None and not file.is_file():
            raise CatalogError(f"{file} does not exist; check {flag}")
    ImageReader(config.images)
    if config.remember is not None and config.checkpoint is not None and config.validation is None:
        raise UserError(
            "--remember with --checkpoint needs --validation: the checkpoint finds the pictures that it was trained on "
            "anyway, so others must choose the handicap"
        )
    if config.base is not None and config.base.resolve() == config.out.resolve():
        raise UserError(f"--base and --out are both {config.out}; a bundle never changes, choose another --out")
    check_image_root(config)


def read_type_parents(path: Path | None, reject: Callable[[Rejected], None]) -> list[TypeParents]:
    """Return one row per type, with the parents of all its lines. Raises `CatalogError` if the file cannot be read."""
    rows: list[TypeParents] = []
    for item in () if path is None else read_jsonl(path):
        if isinstance(item, Rejected):
            rejected = item
        else:
            line, row = item
            try:
                if row.get("parents") is None:
                    raise BadRecord("`parents` is missing")
                type_, label = required_string(row, "type"), optional_string(row, "label") or ""
                rows.append(TypeParents(type=type_, parents=strings(row, "parents"), label=label))
                continue
            except BadRecord as error:
                rejected = Rejected(line=line, reason=str(error), record=excerpt(row))
        assert path is not None
        reject(replace(rejected, reason=f"{path.name}: {rejected.reason}"))
    return TypeHierarchy(rows).rows()


def check_image_root(config: ExportConfig) -> None:
    """Raise `CatalogError` if the image root is missing, for example because it was unmounted."""
    if config.image_root is not None and not config.image_root.is_dir():
        raise CatalogError(f"the image root {config.image_root} does not exist; mount it, or check --image-root")


def content_settings(
    config: ExportConfig, *, checkpoint_sha256: str | None, image_encoder_hash: str, device: str
) -> dict[str, Any]:
    """Return everything that the bundle's content depends on, as hashes and values without paths.

    A checkpoint's hash covers its encoders.
    """
    type_parents = config.type_parents_file
    return {
        "catalog_sha256": sha256_file(config.catalog),
        "checkpoint_sha256": checkpoint_sha256,
        **({"image_encoder_hash": image_encoder_hash} if checkpoint_sha256 is None else {}),
        "limit": config.limit,
        "shard_size": config.shard_size,
        "batch_size": config.batch_size,
        "thumbnail_px": config.thumbnail_px,
        "store_text": config.store_text,
        "half": config.half,
        "int8": config.int8,
        **({"float16": True} if config.float16 else {}),  # absent when false, to keep older fingerprints
        "device": device,
        "validation_sha256": None if config.validation is None else sha256_file(config.validation),
        **({"validation_made_up": True} if config.validation_made_up else {}),
        **({"remember_sha256": sha256_file(config.remember)} if config.remember is not None else {}),
        **({"type_parents_sha256": sha256_file(type_parents)} if type_parents is not None else {}),
    }


def refuse_differences(
    out: Path, earlier: Mapping[str, Any], current: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Raise `UserError` if the settings differ from those of an earlier run."""
    absent = {"int8": False, "float16": False, "remember_sha256": None, "type_parents_sha256": None}
    earlier, current = ({**absent, **settings} for settings in (earlier, current))
    differing = [key for key in current if key not in ignored and earlier.get(key) != current[key]]
    if differing:
        names = ", ".join(key.removesuffix("_sha256").removesuffix("_hash").replace("_", " ") for key in differing)
        raise UserError(f"{out} was made with another {names}; resume with the same, or choose another --out")
