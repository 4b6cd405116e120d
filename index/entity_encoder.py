"""The entity encoder of a bundle: it embeds entities that are put while serving. A folder with its own manifest.

entity_side/
    manifest.json           written last: provenance, parity, size and SHA-256 of the files
    adaptor.onnx            patch tokens, text tokens and the image's query embedding in, entity embedding out
    text_encoder.onnx       (+ external data)   `input_ids`, `attention_mask` in, `text_tokens` out
    tokenizer.json

Like the index, it is not part of the fingerprint: `wikiclip export --live` can add it to a finished bundle.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from core.errors import BundleAltered
from index.manifest import FileEntry, Record

FORMAT_VERSION: Final = 1
ENTITY_ENCODER_FOLDER = "entity_side"
ENTITY_ENCODER_MANIFEST_FILE = f"{ENTITY_ENCODER_FOLDER}/manifest.json"
ADAPTOR_FILE = "adaptor.onnx"
TEXT_ENCODER_FILE = "text_encoder.onnx"
TOKENIZER_FILE = "tokenizer.json"
ADAPTOR_INPUTS = ("patch_tokens", "image_mask", "text_tokens", "text_mask", "image_embedding")  # 0.1: without the last
ADAPTOR_OUTPUT = "entity_embedding"
TEXT_INPUTS = ("input_ids", "attention_mask")
TEXT_OUTPUT = "text_tokens"


class EntityEncoder(Record):
    """The manifest. `max_characters` is where a text is cut before tokenising.

    `parity` compares each file with its original: `min_cosine` and `max_abs_diff`.
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
