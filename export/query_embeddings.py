"""Queries of which there is only the embedding, such as the service's feedback.

Shapes: D embedding width.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from core.arrays import Float32Array, normalised
from core.errors import BadParameter
from export.model import ExportModel
from export.onnx import INPUT, output_names
from index.embeddings import read_embedding
from index.manifest import (
    FLOAT16_ENCODER_FILE,
    IMAGE_ENCODER_FILE,
    INT8_ENCODER_FILE,
    FileEntry,
    ImageEncoderEntry,
    encoder_hash,
)
from model.data import QueryEmbedding


class QueryEmbeddings:
    """Accepts embeddings by the image encoder of an unfinished bundle, in any precision that the bundle has."""

    def __init__(self, model: ExportModel, bundle: Path) -> None:
        self._encoder = model.image_encoder
        self._bundle = bundle

    def read(self, embedding: QueryEmbedding) -> Float32Array:
        """Return an embedding [D]. Raises `BadParameter`, whose message is a reason to reject it."""
        if embedding.encoder is not None and embedding.encoder not in self._hashes:
            raise BadParameter(
                f"the embedding is by the encoder {embedding.encoder[:64]}, not by the one exported here; embed the "
                "image again"
            )
        embedding_D = read_embedding(embedding.values, self._encoder.embedding_dim)
        return normalised(embedding_D[None]).reshape(-1)

    @cached_property
    def _hashes(self) -> frozenset[str]:
        files = {file.name: FileEntry.of(file) for file in self._bundle.iterdir() if file.is_file()}
        outputs, preprocessing = output_names(self._encoder), self._encoder.preprocessing.to_dict()
        entry = ImageEncoderEntry(file=IMAGE_ENCODER_FILE, input=INPUT, outputs=outputs, parity={})
        precisions = {IMAGE_ENCODER_FILE, INT8_ENCODER_FILE, FLOAT16_ENCODER_FILE} & files.keys()
        return frozenset(encoder_hash(files, entry, preprocessing, file) for file in precisions)
