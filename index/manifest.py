"""The manifests of a bundle: `manifest.json`, and those of its search index and of its entity encoder.

How the format grows: a new entry has a default, and is left out if it equals the default. Readers ignore entries that
they do not know, but keep them, so that the fingerprint does not depend on the version of the reader. A bundle that
older readers would misread gets the next schema version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.errors import BundleAltered, BundleIncomplete, BundleSchemaMismatch
from core.files import atomic_write_bytes, sha256_file
from index.embeddings import Pooling

SCHEMA_VERSION = 1  # written, unless a bundle needs a newer reader: see `schema_version`
READABLE_SCHEMA_VERSIONS = (1, 2)
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index/entity.faiss"
INDEX_MANIFEST_FILE = "index/manifest.json"
STORE_FILE = "entities.sqlite"
EMBEDDINGS_FOLDER = "embeddings"
REMEMBERED_FOLDER = "remembered"  # only in bundles with remembered vectors
OPEN_SET_FILE = "familiarity.npz"  # only in calibrated bundles
IMAGE_ENCODER_FILE = "image_encoder.onnx"
INT8_ENCODER_FILE = "image_encoder.int8.onnx"
FLOAT16_ENCODER_FILE = "image_encoder.float16.onnx"
# The folder of the entity encoder and the files in it.
ENTITY_ENCODER_FOLDER = "entity_side"
ENTITY_ENCODER_MANIFEST_FILE = f"{ENTITY_ENCODER_FOLDER}/manifest.json"
ADAPTOR_FILE = "adaptor.onnx"  # patch tokens, text tokens and the query embedding of the image in, entity embedding out
TEXT_ENCODER_FILE = "text_encoder.onnx"  # and external data
TOKENIZER_FILE = "tokenizer.json"
ADAPTOR_INPUTS = ("patch_tokens", "image_mask", "text_tokens", "text_mask", "image_embedding")  # 0.1: without the last
ADAPTOR_OUTPUT = "entity_embedding"
TEXT_INPUTS = ("input_ids", "attention_mask")
TEXT_OUTPUT = "text_tokens"

_NOT_FINGERPRINTED = {"created_at", "elapsed_s", "choice"}  # times differ between equal bundles


class Record(BaseModel):
    """A part of a manifest. Entries of newer versions are in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")
    remedy: ClassVar[str] = "export the bundle again"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raise as `parse` does."""
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Read JSON that comes from `source`. Raise `BundleAltered` if it is malformed."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, each['loc']))} {each['msg']}".strip() for each in error.errors())
            raise BundleAltered(f"{source} is malformed: {reasons}; {cls.remedy}") from error

    def write(self, path: Path) -> None:
        content = json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"
        atomic_write_bytes(path, content.encode())


class FileEntry(Record):
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(bytes=path.stat().st_size, sha256=sha256_file(path))

    def check(self, path: Path, remedy: str, *, hashed: bool = True) -> None:
        """Raise `BundleIncomplete` if the file is missing, `BundleAltered` if its size or hash differs."""
        if not path.is_file():
            raise BundleIncomplete(f"{path} is missing; {remedy}")
        size_bytes = path.stat().st_size
        if size_bytes != self.bytes:
            raise BundleAltered(f"{path} has {size_bytes} bytes, the manifest says {self.bytes}; {remedy}")
        if hashed and sha256_file(path) != self.sha256:
            raise BundleAltered(f"{path} is altered: its SHA-256 differs from the manifest's; {remedy}")


class Counts(Record):
    """`without_image` and `without_text` count entities with placeholder tokens.

    `rejected` counts catalog records that were skipped, `images_failed` images that could not be used.
    """

    entities: int
    embeddings: int
    without_image: int
    without_text: int
    rejected: int
    images_failed: int = 0


class Int8Entry(Record):
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


class Float16Entry(Record):
    """The image encoder in float16, for GPUs, compared with the float file."""

    file: str
    max_abs_diff: float
    min_cosine: float


class ImageEncoderEntry(Record):
    """The exported image encoder. `parity` compares it with the original: `max_abs_diff` and `min_cosine`."""

    file: str
    input: str
    outputs: tuple[str | None, str]  # patch tokens (None: the encoder has none), image embedding
    parity: Mapping[str, float]
    int8: Int8Entry | None = Field(default=None, exclude_if=lambda entry: entry is None)
    float16: Float16Entry | None = Field(default=None, exclude_if=lambda entry: entry is None)

    @property
    def has_patch_tokens(self) -> bool:
        return self.outputs[0] is not None

    @property
    def files(self) -> dict[str, str]:
        """The files by precision: `float`, and `int8` and `float16` if the bundle has them."""
        others = {"int8": self.int8, "float16": self.float16}
        return {"float": self.file, **{name: entry.file for name, entry in others.items() if entry is not None}}


class Share(Record):
    """How many of some queries were answered right. `low` and `high` are the 95 % interval in percent (Wilson)."""

    right: int
    queries: int
    low: float
    high: float


class ConfusedPair(Record):
    """Two entities that are easily mistaken for each other. `errors` counts queries of one that found the other.

    `similarity` is the mean score of the other one.
    """

    entity_ids: tuple[str, str]
    titles: tuple[str, str]
    errors: int
    similarity: float


class SelfCheck(Record):
    """How well a catalog distinguishes its entities, measured by an export without checkpoint and validation queries.

    `left_out` are images of entities with several, each searched without itself. `views` are close-ups made from
    the only image of an entity. `no_confidence` says why there is no calibration. It is empty if there is one.
    """

    left_out: Share
    views: Share
    confused: tuple[ConfusedPair, ...]
    no_confidence: str


class Gain(Record):
    """Percent of some queries that were answered right, without and with remembered vectors."""

    queries: int
    before: float
    after: float


class RememberedEntry(Record):
    """The remembered vectors: one for each of `entities`. `handicap` is subtracted from their cosines.

    The rest is the export's: it used so many `pictures`, and measured `seen` and `held_out` on them, each left out of
    its entity's vector, and each with the whole vector left out.
    """

    entities: int
    pictures: int
    handicap: float
    seen: Gain
    held_out: Gain


class Manifest(Record):
    """`manifest.json`. `files` lists every file of the bundle except the manifest and those in `index/`."""

    schema_version: int
    name: str
    model: Mapping[str, Any]
    preprocessing: Mapping[str, Any]  # as in `imaging.Preprocessing.to_dict`
    embedding_dim: int
    patches: int
    counts: Counts
    calibration: Mapping[str, Any] | None  # as in `index.calibration.Calibration.to_dict`
    image_encoder: ImageEncoderEntry
    pooling: Pooling = Field(default="nearest", exclude_if=lambda pooling: pooling == "nearest")
    remembered: RememberedEntry | None = Field(default=None, exclude_if=lambda entry: entry is None)
    self_check: SelfCheck | None = Field(default=None, exclude_if=lambda check: check is None)
    export: Mapping[str, Any]  # the settings that the content depends on
    files: Mapping[str, FileEntry]
    created_at: str  # ISO 8601, UTC
    elapsed_s: float

    @property
    def images_only(self) -> bool:
        """Whether entities have the embeddings of their images, and their texts were not embedded."""
        return "text_encoder" in self.model and self.model["text_encoder"] is None

    def encoder_hash(self, file: str) -> str:
        """Return the `encoder_hash` of one of the bundle's image encoders."""
        return encoder_hash(self.files, self.image_encoder, self.preprocessing, file)

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """Read a manifest. Raise `BundleSchemaMismatch`, or `BundleAltered` if it is malformed."""
        version = (Record.parse(content, source).model_extra or {}).get("schema_version")
        if version not in READABLE_SCHEMA_VERSIONS:
            raise BundleSchemaMismatch(
                f"{source} has schema version {version}, this version of WikiCLIP Serve reads "
                f"{' and '.join(map(str, READABLE_SCHEMA_VERSIONS))}; upgrade it, or {cls.remedy}"
            )
        return super().parse(content, source)


class IndexManifest(Record):
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

    @property
    def file(self) -> FileEntry:
        return FileEntry(bytes=self.bytes, sha256=self.sha256)


class EntityEncoder(Record):
    """`entity_side/manifest.json`: the encoder of entities that are put while serving. Written last in its folder.

    Like the index, it is not part of the fingerprint: `wikiclip export --live` can add it to a finished bundle.
    `max_characters` is where a text is cut before tokenising. `parity` compares each file with its original:
    `min_cosine` and `max_abs_diff`.
    """

    remedy: ClassVar[str] = f"remove {ENTITY_ENCODER_FOLDER}/ and make it again with `wikiclip export --live --resume`"

    format_version: Literal[1]
    checkpoint_sha256: str | None  # None in synthetic bundles
    text_encoder: str
    patches: int
    patch_dim: int
    text_dim: int
    max_characters: int
    parity: Mapping[str, Mapping[str, float]]
    files: Mapping[str, FileEntry]

    @classmethod
    def open(cls, bundle: Path, checkpoint_sha256: object) -> Self | None:
        """Check all files and that they were made from that checkpoint. Return None if the bundle has no encoder.

        Raise `BundleIncomplete` or `BundleAltered`.
        """
        folder = bundle / ENTITY_ENCODER_FOLDER
        if not (bundle / ENTITY_ENCODER_MANIFEST_FILE).is_file():
            return None
        encoder = cls.read(bundle / ENTITY_ENCODER_MANIFEST_FILE)
        if encoder.checkpoint_sha256 != checkpoint_sha256:
            raise BundleAltered(f"{folder} and the bundle were made from different checkpoints; {cls.remedy}")
        for name, entry in encoder.files.items():
            entry.check(folder / name, cls.remedy)
        return encoder


def schema_version(
    entry: ImageEncoderEntry, preprocessing: Mapping[str, Any], pooling: Pooling, remembered: RememberedEntry | None
) -> int:
    """Return the version to write.

    Readers of version 1 need patch tokens, and know no `resize_px`, no mean and no remembered vectors.
    """
    newer = not entry.has_patch_tokens or "resize_px" in preprocessing or pooling == "mean" or remembered is not None
    return 2 if newer else SCHEMA_VERSION


def encoder_hash(
    files: Mapping[str, FileEntry], entry: ImageEncoderEntry, preprocessing: Mapping[str, Any], file: str
) -> str:
    """Return a hash of all that an image's embedding depends on: the encoder's `file` and the preprocessing.

    `files` are those of the bundle. Bundles with the same encoder have the same hash, whatever else differs.
    """
    others = [STORE_FILE, f"{EMBEDDINGS_FOLDER}/", f"{REMEMBERED_FOLDER}/", OPEN_SET_FILE]
    others += [each for each in (INT8_ENCODER_FILE, FLOAT16_ENCODER_FILE) if each != file]
    own = {name: each.sha256 for name, each in files.items() if not name.startswith(tuple(others))}
    content = [own, dict(preprocessing), file, entry.input, list(entry.outputs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(manifest: Manifest, index_manifest: IndexManifest) -> str:
    """Return 12 hexadecimal digits that change with anything that answers depend on, and with nothing else."""
    return _digest(
        [manifest.model_dump(exclude=_NOT_FINGERPRINTED), index_manifest.model_dump(exclude=_NOT_FINGERPRINTED)]
    )


def content_fingerprint(manifest: Manifest) -> str:
    """Return a fingerprint of everything except the index."""
    return _digest(manifest.model_dump(exclude=_NOT_FINGERPRINTED))


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
