"""An entity's embedding from its image and its text, as an export makes it, by the files of the bundle's entity side.

Shapes: P patches, C patch channels, T text tokens, L text channels, D embedding width.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from index.bundle import Bundle
from index.entity_encoder import (
    ADAPTOR_FILE,
    ADAPTOR_INPUTS,
    ADAPTOR_OUTPUT,
    ENTITY_ENCODER_FOLDER,
    TEXT_ENCODER_FILE,
    TEXT_INPUTS,
    TEXT_OUTPUT,
    TOKENIZER_FILE,
    EntityEncoder,
)
from service.encoder import open_session

_THREADS = 1  # an entity may take a little longer, so that queries do not

Float32Array = npt.NDArray[np.float32]


class PatchEncoder(Protocol):
    def patch_tokens(self, pixels_BHW3: npt.NDArray[np.uint8]) -> Float32Array: ...


class EntityEmbedder:
    """Embeds entities one by one. Raises `UserError` where `tokenizers` is not installed, else as `OnnxEncoder`."""

    def __init__(self, bundle: Bundle, side: EntityEncoder, encoder: PatchEncoder) -> None:
        if importlib.util.find_spec("tokenizers") is None:
            raise UserError("the bundle's entity side needs the package tokenizers; install it with the extra `live`")
        from tokenizers import Tokenizer

        folder = bundle.path / ENTITY_ENCODER_FOLDER
        self._side = side
        self._encoder = encoder
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._text_encoder = open_session(folder / TEXT_ENCODER_FILE, "cpu", _THREADS)
        self._adaptor = open_session(folder / ADAPTOR_FILE, "cpu", _THREADS)

    def embed(self, pixels_HW3: npt.NDArray[np.uint8] | None, text: str) -> Float32Array:
        """The embedding [D], L2-normalised. An entity may lack its image (None) or its text (blank)."""
        patch_tokens_1PC = np.zeros((1, self._side.patches, self._side.patch_dim), np.float32)
        if pixels_HW3 is not None:
            patch_tokens_1PC = self._encoder.patch_tokens(pixels_HW3[None])
        text_tokens_1TL, text_mask_1T = self._text_tokens(text)
        given = (patch_tokens_1PC, np.array([pixels_HW3 is not None]), text_tokens_1TL, text_mask_1T)
        (embedding_1D,) = self._adaptor.run([ADAPTOR_OUTPUT], dict(zip(ADAPTOR_INPUTS, given, strict=True)))
        embedding_D: Float32Array = embedding_1D[0]
        return embedding_D

    def _text_tokens(self, text: str) -> tuple[Float32Array, npt.NDArray[np.bool_]]:
        ids = self._tokenizer.encode(text.strip()[: self._side.max_characters]).ids if text.strip() else []
        if not ids:  # one token that is masked: the adaptor's own stand-in takes its place
            return np.zeros((1, 1, self._side.text_dim), np.float32), np.zeros((1, 1), np.bool_)
        ids_1T = np.array([ids], np.int64)
        (text_tokens_1TL,) = self._text_encoder.run(
            [TEXT_OUTPUT], dict(zip(TEXT_INPUTS, (ids_1T, np.ones_like(ids_1T)), strict=True))
        )
        return text_tokens_1TL, np.ones(ids_1T.shape, np.bool_)
