"""The entity side of a bundle: what embeds an entity that is put while serving. A folder with a manifest of its own.

entity_side/
    manifest.json           written last; what it was made from, parity, size and SHA-256 of the rest
    adaptor.onnx            the adaptor: tokens in, the entity's embedding out
    text_encoder.onnx       (+ external data)   `input_ids`, `attention_mask` in, `text_tokens` out
    tokenizer.json

Like the index it is no part of the bundle's identity: `wikiclip export --live` can add it to a finished bundle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from core.errors import BundleAltered, BundleIncomplete
from core.files import atomic_write_bytes
from index.manifest import FileEntry

FORMAT_VERSION = 1
ENTITY_ENCODER_FOLDER = "entity_side"
ADAPTOR_FILE = "adaptor.onnx"
TEXT_ENCODER_FILE = "text_encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
ADAPTOR_INPUTS = ("patch_tokens", "image_mask", "text_tokens", "text_mask")
ADAPTOR_OUTPUT = "entity_embedding"
TEXT_INPUTS = ("input_ids", "attention_mask")
TEXT_OUTPUT = "text_tokens"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class EntityEncoder:
    """Its manifest. `max_characters` is where a text is cut before it is tokenised, `parity` how far each file is from
    its original (`min_cosine`, `max_abs_diff`)."""

    format_version: int
    checkpoint_sha256: str
    text_encoder: str
    patches: int
    patch_dim: int
    text_dim: int
    max_characters: int
    parity: Mapping[str, Mapping[str, float]]
    files: Mapping[str, FileEntry]

    @classmethod
    def open(cls, bundle: Path, checkpoint_sha256: object) -> Self | None:
        """The entity side of a bundle made from that checkpoint, every file checked; None where it has none.

        Raises `BundleIncomplete` or `BundleAltered`.
        """
        folder = bundle / ENTITY_ENCODER_FOLDER
        if not (folder / _MANIFEST).is_file():
            return None
        side = cls.read(bundle)
        if side.checkpoint_sha256 != checkpoint_sha256:
            raise BundleAltered(f"{folder} was made from another checkpoint than the bundle; {_REMEDY}")
        for name, entry in side.files.items():
            if not (folder / name).is_file():
                raise BundleIncomplete(f"{folder / name} is missing; {_REMEDY}")
            if FileEntry.of(folder / name) != entry:
                raise BundleAltered(f"{folder / name} is altered; {_REMEDY}")
        return side

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """The manifest alone, without a look at the files. Raises `BundleAltered`."""
        path = bundle / ENTITY_ENCODER_FOLDER / _MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"it has format version {content['format_version']}, not {FORMAT_VERSION}")
            return cls(**{**content, "files": {name: FileEntry(**entry) for name, entry in content["files"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleAltered(f"{path} is not as it was written ({error}); {_REMEDY}") from error

    def write(self, bundle: Path) -> None:
        """Write the manifest, when all files are in place."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        atomic_write_bytes(bundle / ENTITY_ENCODER_FOLDER / _MANIFEST, content.encode())


_REMEDY = f"remove {ENTITY_ENCODER_FOLDER}/ and make it again with `wikiclip export --live --resume`"
