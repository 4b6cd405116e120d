"""What a bundle says about itself: `manifest.json` of the whole, `index/manifest.json` of its search index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from core.errors import BundleAltered, BundleSchemaMismatch
from core.files import atomic_write_bytes, sha256_file

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index/entity.faiss"
INDEX_MANIFEST_FILE = "index/manifest.json"
STORE_FILE = "entities.sqlite"
EMBEDDINGS_FOLDER = "embeddings"
OPEN_SET_FILE = "familiarity.npz"  # of a calibrated bundle
IMAGE_ENCODER_FILE = "image_encoder.onnx"
INT8_ENCODER_FILE = "image_encoder.int8.onnx"
FLOAT16_ENCODER_FILE = "image_encoder.float16.onnx"

# What may differ between two makings of the same thing, so it is no part of its identity: times, and what was timed.
_TIMES = ("created_at", "elapsed_s", "choice")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(bytes=path.stat().st_size, sha256=sha256_file(path))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """`entities` and `embeddings` are what the bundle holds, `without_*` the entities that have stand-in tokens.

    `rejected` are catalog records that were skipped, `images_failed` images that could not be used.
    """

    entities: int
    embeddings: int
    without_image: int
    without_text: int
    rejected: int
    images_failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Int8Entry:
    """The image encoder in int8, for queries on a CPU, and what that costs against the float file.

    Shares of `images` are in percent. `judged_on` says what was asked: "validation queries", or "catalog images", each
    of which is right where its own entity comes first. What ranges were taken from is none of them.
    """

    file: str
    calibrated_on: int  # images of the catalog
    judged_on: str
    images: int
    min_cosine: float  # of embeddings, to the float file's
    mean_cosine: float
    same_top_1: float
    top_1_float: float
    top_1_int8: float


@dataclass(frozen=True, kw_only=True)
class Float16Entry:
    """The image encoder computing in float16, for queries on a GPU, and how far it is from the original."""

    file: str
    max_abs_diff: float
    min_cosine: float  # of image embeddings


@dataclass(frozen=True, kw_only=True)
class ImageEncoderEntry:
    """The exported image encoder: its file in the bundle, its tensor names, how far it is from the original.

    `int8` and `float16` are None of a bundle without such a file.
    """

    file: str
    input: str
    outputs: tuple[str, str]  # patch tokens, image embedding
    parity: Mapping[str, float]  # max_abs_diff, min_cosine
    int8: Int8Entry | None = None
    float16: Float16Entry | None = None

    @property
    def files(self) -> dict[str, str]:
        """Its files by precision: `float`, and of `int8` and `float16` what there is."""
        others = {"int8": self.int8, "float16": self.float16}
        return {"float": self.file, **{name: entry.file for name, entry in others.items() if entry is not None}}


_OTHER_PRECISIONS = {"int8": Int8Entry, "float16": Float16Entry}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`. `files` names every file of the bundle but the manifest itself and what lies in `index/`."""

    schema_version: int
    name: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]  # the form of `imaging.Preprocessing.to_dict`
    embedding_dim: int
    patches: int
    counts: Counts
    calibration: Mapping[str, Any] | None  # the form of `index.calibration.Calibration.to_dict`
    image_encoder: ImageEncoderEntry
    export: Mapping[str, Any]  # the settings that the content depends on
    files: Mapping[str, FileEntry]
    created_at: str  # ISO 8601, UTC
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        for precision in _OTHER_PRECISIONS:
            if content["image_encoder"][precision] is None:  # a bundle without keeps the fingerprint it always had
                del content["image_encoder"][precision]
        return content

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest. Raises `BundleSchemaMismatch`, or `BundleAltered` where it is not what was written."""
        content = _read_object(path)
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BundleSchemaMismatch(
                f"{path} has schema version {version}, this version reads {SCHEMA_VERSION}; export the bundle again"
            )
        _check_fields(cls, content, path)
        try:
            encoder = dict(content["image_encoder"])
            others = {name: kind(**encoder[name]) for name, kind in _OTHER_PRECISIONS.items() if name in encoder}
            return cls(
                **{
                    **content,
                    "counts": Counts(**content["counts"]),
                    "image_encoder": ImageEncoderEntry(**{**encoder, "outputs": tuple(encoder["outputs"]), **others}),
                    "files": {name: FileEntry(**entry) for name, entry in content["files"].items()},
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise _malformed(path, str(error)) from error

    def write(self, path: Path) -> None:
        atomic_write_bytes(path, _pretty(self.to_dict()))


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """`index/manifest.json`: how the index was made and why so, and what its file must be.

    `choice` is what was measured on the way: targets, seed, candidates, and the curve at full size. None where nothing
    was.
    """

    factory: str
    parameters: Mapping[str, Any]
    why: str
    metric: str
    dim: int
    count: int
    bytes: int
    sha256: str
    created_at: str
    elapsed_s: float
    choice: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an index manifest. Raises `BundleAltered` where it is not what was written."""
        content = _read_object(path)
        _check_fields(cls, content, path)
        return cls(**content)

    def write(self, path: Path) -> None:
        atomic_write_bytes(path, _pretty(asdict(self)))


def fingerprint(manifest: Manifest, index_manifest: IndexManifest) -> str:
    """12 hexadecimal digits that change with anything a bundle answers from, and with nothing else."""
    return _digest([_without_times(manifest.to_dict()), _without_times(asdict(index_manifest))])


def content_fingerprint(manifest: Manifest) -> str:
    """As `fingerprint`, but the same whatever index is built over the embeddings."""
    return _digest(_without_times(manifest.to_dict()))


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _without_times(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _TIMES}


def _pretty(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _malformed(path, f"it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise _malformed(path, "it is no JSON object")
    return content


def _check_fields(cls: type[Manifest] | type[IndexManifest], content: Mapping[str, Any], path: Path) -> None:
    known = {field.name for field in fields(cls)}
    wanted = {field.name for field in fields(cls) if field.default is MISSING}
    if missing := sorted(wanted - content.keys()):
        raise _malformed(path, f"it lacks {', '.join(missing)}")
    if unknown := sorted(content.keys() - known):
        raise _malformed(path, f"it has unknown entries: {', '.join(unknown)}")


def _malformed(path: Path, reason: str) -> BundleAltered:
    return BundleAltered(f"{path} is not as it was written: {reason}; export the bundle again")
