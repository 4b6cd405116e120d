"""The entity encoder of a bundle: it embeds entities that are put while serving. A folder with its own manifest.

entity_side/
    manifest.json           written last: provenance, parity, size and SHA-256 of the files
    adaptor.onnx            patch and text tokens in, entity embedding out
    text_encoder.onnx       (+ external data)   `input_ids`, `attention_mask` in, `text_tokens` out
    tokenizer.json

Like the index, it is not part of the fingerprint: `wikiclip export --live` can add it to a finished bundle.
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
ENTITY_ENCODER_MANIFEST_FILE = f"{ENTITY_ENCODER_FOLDER}/manifest.json"
ADAPTOR_FILE = "adaptor.onnx"
TEXT_ENCODER_FILE = "text_encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
ADAPTOR_INPUTS = ("patch_tokens", "image_mask", "text_tokens", "text_mask")
ADAPTOR_OUTPUT = "entity_embedding"
TEXT_INPUTS = ("input_ids", "attention_mask")
TEXT_OUTPUT = "text_tokens"
_REMEDY = f"remove {ENTITY_ENCODER_FOLDER}/ and make it again with `wikiclip export --live --resume`"


@dataclass(frozen=True, kw_only=True)
class EntityEncoder:
    """The manifest. `max_characters` is where a text is cut before tokenising.

    `parity` compares each file with its original: `min_cosine` and `max_abs_diff`.
    """

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
        """Check all files and that they were made from that checkpoint. Return None if the bundle has no encoder.

        Raise `BundleIncomplete` or `BundleAltered`.
        """
        folder = bundle / ENTITY_ENCODER_FOLDER
        if not (bundle / ENTITY_ENCODER_MANIFEST_FILE).is_file():
            return None
        encoder = cls.read(bundle)
        if encoder.checkpoint_sha256 != checkpoint_sha256:
            raise BundleAltered(f"{folder} and the bundle were made from different checkpoints; {_REMEDY}")
        for name, entry in encoder.files.items():
            if not (folder / name).is_file():
                raise BundleIncomplete(f"{folder / name} is missing; {_REMEDY}")
            if FileEntry.of(folder / name) != entry:
                raise BundleAltered(f"{folder / name} is altered; {_REMEDY}")
        return encoder

    @classmethod
    def read(cls, bundle: Path) -> Self:
        """Read the manifest without checking the files. Raise `BundleAltered`."""
        path = bundle / ENTITY_ENCODER_MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"it has format version {content['format_version']}, not {FORMAT_VERSION}")
            return cls(**{**content, "files": {name: FileEntry(**entry) for name, entry in content["files"].items()}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleAltered(f"{path} is malformed ({error}); {_REMEDY}") from error

    def write(self, bundle: Path) -> None:
        """Write the manifest. All files must be in place."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        atomic_write_bytes(bundle / ENTITY_ENCODER_MANIFEST_FILE, content.encode())
