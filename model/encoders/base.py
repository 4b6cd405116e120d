"""The two encoder Protocols, the image encoder around a torch module, and the content hash that identifies an encoder.

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
import torch.nn.functional as F
from torch import nn

from core.errors import EncoderSpecError, first_line
from imaging.preprocess import Preprocessing, normalise


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


class TorchImageEncoder:
    """A frozen image tower (`ImageEncoder`) around a module, which the exporter writes as ONNX.

    The module maps `pixel_values [B, 3, H, W]` to `(patch_tokens [B, P, C], image_embedding [B, D])`. It runs in its
    stored precision on a GPU and in float32 on a CPU. `saved_config` is the network's config file and part of the
    content hash. Raises `EncoderSpecError` if a trial run fails.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        saved_config: Mapping[str, Any],
        spec: str,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.preprocessing = preprocessing
        self.content_hash = hash_module(module, {"config": content_config(saved_config), **preprocessing.to_dict()})
        dtype = next(module.parameters()).dtype if device.type == "cuda" else torch.float32
        self.module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._device = device
        size = preprocessing.size_px
        try:
            features = self.encode(np.zeros((1, size, size, 3), np.uint8))
            _, self.patches, self.patch_dim = features.patch_tokens_BPC.shape
            _, self.embedding_dim = features.image_embedding_BD.shape
        except (RuntimeError, ValueError, TypeError) as error:
            raise EncoderSpecError(
                f"{spec} fails on an image of {size} px, the size in its preprocessing: {first_line(error)}"
            ) from error

    @torch.no_grad()
    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures:
        """Return patch tokens `[B, P, C]` and L2-normalised embeddings `[B, D]`, float32, on the encoder's device."""
        pixel_values = torch.from_numpy(normalise(pixels_BHW3, self.preprocessing)).to(self._device)
        patch_tokens_BPC, image_embedding_BD = self.module(pixel_values)
        return ImageFeatures(
            patch_tokens_BPC=patch_tokens_BPC.float(), image_embedding_BD=F.normalize(image_embedding_BD.float(), dim=1)
        )


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
