"""The manifests of a bundle: `manifest.json`, and `index/manifest.json` of its search index.

How the format grows: a new entry has a default, and is left out where it equals the default. Readers ignore entries
that they do not know, but keep them, so that the fingerprint does not depend on the version of the reader. A bundle
that older readers would misread gets the next schema version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from core.errors import BundleAltered, BundleSchemaMismatch
from core.files import atomic_write_bytes, sha256_file

SCHEMA_VERSION = 1  # written: nothing yet needs a newer reader
READABLE_SCHEMA_VERSIONS = (1, 2)
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index/entity.faiss"
INDEX_MANIFEST_FILE = "index/manifest.json"
STORE_FILE = "entities.sqlite"
EMBEDDINGS_FOLDER = "embeddings"
OPEN_SET_FILE = "familiarity.npz"  # only in calibrated bundles
IMAGE_ENCODER_FILE = "image_encoder.onnx"
INT8_ENCODER_FILE = "image_encoder.int8.onnx"
FLOAT16_ENCODER_FILE = "image_encoder.float16.onnx"

_NOT_FINGERPRINTED = ("created_at", "elapsed_s", "choice")  # times differ between equal bundles
_ALWAYS_WRITTEN = ("images_failed", "choice")  # as in version 0.1

Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(bytes=path.stat().st_size, sha256=sha256_file(path))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """`without_image` and `without_text` count entities with placeholder tokens.

    `rejected` counts catalog records that were skipped, `images_failed` images that could not be used.
    """

    entities: int
    embeddings: int
    without_image: int
    without_text: int
    rejected: int
    images_failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Int8Entry:
    """The image encoder in int8, for CPUs, compared with the float file.

    `same_top_1`, `top_1_float` and `top_1_int8` are percent of `images`. `judged_on` says which images: "validation
    queries" or "catalog images". An answer is right if it is the image's own entity.
    """

    file: str
    calibrated_on: int  # images
    judged_on: str
    images: int
    min_cosine: float
    mean_cosine: float
    same_top_1: float
    top_1_float: float
    top_1_int8: float


@dataclass(frozen=True, kw_only=True)
class Float16Entry:
    """The image encoder in float16, for GPUs, compared with the float file."""

    file: str
    max_abs_diff: float
    min_cosine: float


@dataclass(frozen=True, kw_only=True)
class ImageEncoderEntry:
    """The exported image encoder. `parity` compares it with the original: `max_abs_diff` and `min_cosine`."""

    file: str
    input: str
    outputs: tuple[str, str]  # patch tokens, image embedding
    parity: Mapping[str, float]
    int8: Int8Entry | None = None
    float16: Float16Entry | None = None

    @property
    def files(self) -> dict[str, str]:
        """The files by precision: `float`, and `int8` and `float16` if the bundle has them."""
        others = {"int8": self.int8, "float16": self.float16}
        return {"float": self.file, **{name: entry.file for name, entry in others.items() if entry is not None}}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`. `files` lists every file of the bundle except the manifest and those in `index/`.

    `unknown` holds the entries of a newer version, in the place where they were found.
    """

    schema_version: int
    name: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]  # as in `imaging.Preprocessing.to_dict`
    embedding_dim: int
    patches: int
    counts: Counts
    calibration: Mapping[str, Any] | None  # as in `index.calibration.Calibration.to_dict`
    image_encoder: ImageEncoderEntry
    export: Mapping[str, Any]  # the settings that the content depends on
    files: Mapping[str, FileEntry]
    created_at: str  # ISO 8601, UTC
    elapsed_s: float
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return _merge(_to_json(self), self.unknown)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest. Raise `BundleSchemaMismatch`, or `BundleAltered` if it is malformed."""
        content = _read_object(path)
        version = content.get("schema_version")
        if version not in READABLE_SCHEMA_VERSIONS:
            raise BundleSchemaMismatch(
                f"{path} has schema version {version}, this version of WikiCLIP Serve reads "
                f"{' and '.join(map(str, READABLE_SCHEMA_VERSIONS))}; upgrade it, or export the bundle again"
            )
        try:
            _check_required(cls, content)
            encoder = dict(content["image_encoder"])
            encoder["outputs"] = tuple(encoder["outputs"])
            for precision, kind in (("int8", Int8Entry), ("float16", Float16Entry)):
                if encoder.get(precision) is not None:
                    encoder[precision] = _parse(kind, encoder[precision])
            parsed = {
                "counts": _parse(Counts, content["counts"]),
                "image_encoder": _parse(ImageEncoderEntry, encoder),
                "files": {name: _parse(FileEntry, entry) for name, entry in content["files"].items()},
            }
            manifest = _parse(cls, {**content, **parsed})
        except (TypeError, KeyError, AttributeError) as error:
            raise _malformed(path, str(error)) from error
        return replace(manifest, unknown=_difference(content, manifest.to_dict()))

    def write(self, path: Path) -> None:
        atomic_write_bytes(path, _pretty(self.to_dict()))


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """`index/manifest.json`: how the index was made and why, and the size and hash of its file.

    `choice` holds the measurements behind an automatic choice, if one was made.
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
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return _merge(_to_json(self), self.unknown)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an index manifest. Raise `BundleAltered` if it is malformed."""
        content = _read_object(path)
        try:
            manifest = _parse(cls, content)
        except TypeError as error:
            raise _malformed(path, str(error)) from error
        return replace(manifest, unknown=_difference(content, manifest.to_dict()))

    def write(self, path: Path) -> None:
        atomic_write_bytes(path, _pretty(self.to_dict()))


def fingerprint(manifest: Manifest, index_manifest: IndexManifest) -> str:
    """Return 12 hexadecimal digits that change with anything that answers depend on, and with nothing else."""
    return _digest([_without_times(manifest.to_dict()), _without_times(index_manifest.to_dict())])


def content_fingerprint(manifest: Manifest) -> str:
    """Return a fingerprint of everything except the index."""
    return _digest(_without_times(manifest.to_dict()))


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _without_times(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_FINGERPRINTED}


def _pretty(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _malformed(path, f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _malformed(path, "it is not a JSON object")
    return content


def _parse(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """Make a record from the entries that it knows. Raise `TypeError` if a required one is missing."""
    _check_required(kind, content)
    known = {each.name for each in fields(kind)} - {"unknown"}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in known})


def _check_required(kind: type[Record], content: Mapping[str, Any]) -> None:
    required = [
        each.name
        for each in fields(kind)  # type: ignore[arg-type]
        if each.default is MISSING and each.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in content]:
        raise TypeError(f"it lacks {', '.join(missing)}")


def _to_json(value: Any) -> Any:
    """Return the JSON form of records, without optional entries that equal their default."""
    if isinstance(value, Mapping):
        return {name: _to_json(each) for name, each in value.items()}
    if not is_dataclass(value):
        return value
    return {
        each.name: _to_json(getattr(value, each.name))
        for each in fields(value)
        if each.name != "unknown"
        and (each.default is MISSING or each.name in _ALWAYS_WRITTEN or getattr(value, each.name) != each.default)
    }


def _difference(content: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `content` that `known` lacks, at any depth, unless they are null."""
    rest = {name: value for name, value in content.items() if name not in known and value is not None}
    for name, value in content.items():
        if isinstance(value, dict) and name in known and (inner := _difference(value, known[name])):
            rest[name] = inner
    return rest


def _merge(known: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**unknown, **known}
    for name in unknown.keys() & known.keys():
        merged[name] = _merge(known[name], unknown[name])
    return merged


def _malformed(path: Path, reason: str) -> BundleAltered:
    return BundleAltered(f"{path} is malformed: {reason}; export the bundle again")
