"""The two encoder Protocols, their outputs, and the content hash that identifies an encoder.

Shapes: B batch, P patches, T text tokens, C the encoder's channel width, D the embedding width, H = W = size_px.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from core.errors import EncoderSpecError
from imaging.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    patch_tokens_BPC: torch.Tensor  # empty for an encoder without patch tokens
    image_embedding_BD: torch.Tensor  # L2-normalised


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    text_tokens_BTC: torch.Tensor
    mask_BT: torch.Tensor  # bool, true where there is a token


class ImageEncoder(Protocol):
    """A frozen image tower. Caches and checkpoints are keyed by `content_hash`, a hash of what it computes.

    The exporter needs one of two more attributes: `module`, a torch module with `forward(pixel_values) ->
    (patch_tokens, image_embedding)`, or `onnx_path`. Without patch tokens, `patches` and `patch_dim` are 0.
    """

    spec: str
    content_hash: str
    preprocessing: Preprocessing
    patches: int
    patch_dim: int
    embedding_dim: int

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures: ...


class TextEncoder(Protocol):
    """A frozen text tower that returns token states. A blank text has no tokens: its mask row is all false."""

    spec: str
    content_hash: str
    dim: int
    max_tokens: int
    layer: int | None  # None: the last hidden state

    def encode(self, texts: Sequence[str]) -> TextFeatures: ...

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return the start and end, in characters, of each token of `encode`. They are equal for a special token."""
        ...

    # The two halves of `encode`: a pipeline can tokenise in another thread.
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> TextFeatures: ...


def hash_module(module: nn.Module, settings: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of a module's weights and buffers and of the settings its output depends on.

    It hashes tensors, not files, so the layout on disk does not matter. Hash before casting to a device's precision:
    the cast would change the hash.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # Viewed as bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def content_config(saved_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's saved config without the fields that record only its path and the version that wrote it."""
    ignored = {"_name_or_path", "name_or_path", "transformers_version"}
    return {key: value for key, value in saved_config.items() if key not in ignored}


def widths(image_encoder: ImageEncoder, text_encoder: TextEncoder) -> dict[str, Any]:
    """Return the fields of `AdaptorConfig` that the encoders determine.

    Raises `EncoderSpecError` if the image encoder has no patch tokens.
    """
    image = image_encoder
    if not image.patches:
        raise EncoderSpecError(
            f"{image.spec} has no patch tokens, which the adaptor needs; use another image encoder, or export without "
            "--checkpoint"
        )
    return {"patch_dim": image.patch_dim, "embedding_dim": image.embedding_dim, "text_dim": text_encoder.dim}
