"""The two seams of the network: a frozen image encoder and a frozen text encoder.

Shapes: B batch, P patches, T text tokens, C the encoder's channel width, D the embedding width, H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from imaging.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ImageFeatures:
    patch_tokens_BPC: torch.Tensor
    image_embedding_BD: torch.Tensor  # L2-normalised


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    text_tokens_BTC: torch.Tensor
    mask_BT: torch.Tensor  # bool, true where a token is


class ImageEncoder(Protocol):
    """A frozen image tower. `spec` and `content_hash` identify it: the feature cache is keyed by the latter."""

    spec: str
    content_hash: str
    preprocessing: Preprocessing
    patches: int
    patch_dim: int
    embedding_dim: int

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures: ...


class TextEncoder(Protocol):
    """A frozen text tower giving token states."""

    spec: str
    content_hash: str
    dim: int
    max_tokens: int

    def encode(self, texts: Sequence[str]) -> TextFeatures: ...
