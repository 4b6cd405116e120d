"""The two seams of the network: a frozen image encoder and a frozen text encoder.

Shapes: B batch, P patches, T text tokens, C the encoder's channel width, D the embedding width, H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from core.errors import EncoderSpecError, UserError
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
    """A frozen image tower. `content_hash` says what it computes: caches and checkpoints are keyed by it.

    One made of torch has a `.module` with `forward(pixel_values) -> (patch_tokens, image_embedding)`, one made of ONNX
    an `.onnx_path`: the exporter needs one of the two.
    """

    spec: str
    content_hash: str
    preprocessing: Preprocessing
    patches: int
    patch_dim: int
    embedding_dim: int

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures: ...


class TextEncoder(Protocol):
    """A frozen text tower giving token states. A blank text has no tokens: its mask row is all false."""

    spec: str
    content_hash: str
    dim: int
    max_tokens: int
    layer: int | None  # None: the last hidden state

    def encode(self, texts: Sequence[str]) -> TextFeatures: ...

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of `encode` stands in its text: start and end in characters, equal for a special token."""
        ...

    # The two halves of `encode`, for who tokenises ahead.
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> TextFeatures: ...


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`. Raises `UserError` if that device is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is none; use auto, cpu or cuda") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UserError(f"device {name} is not on this machine; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name} is not supported; use auto, cpu or cuda")
    return device


def load_image_encoder(
    spec: str, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> ImageEncoder:
    """The image encoder of a spec: `tiny`, `tiny:PATH`, `onnx:PATH` or `hf:ID_OR_PATH`. Raises `EncoderSpecError`."""
    device = resolve_device(str(device))
    kind, _, name = spec.partition(":")
    if kind == "tiny":
        from model.tiny import load_tiny

        return load_tiny(Path(name) if name else None, device=device)
    if kind == "onnx" and name:
        from model.onnx_encoder import OnnxImageEncoder

        return OnnxImageEncoder(Path(name), spec=spec, device=device)
    if kind == "hf" and name:
        from model.huggingface import load_huggingface_image

        return load_huggingface_image(name, device=device, trust_remote_code=trust_remote_code)
    raise EncoderSpecError(f"image encoder {spec!r} is unknown; use tiny, onnx:PATH or hf:ID_OR_PATH")


def load_text_encoder(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    max_tokens: int = 256,
    layer: int | None = None,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """The text encoder of a spec: `minilm` or `hf:ID_OR_PATH`. Raises `EncoderSpecError`.

    `layer` is the hidden state to read, counted as transformers does; None is the model's last hidden state.
    """
    device = resolve_device(str(device))
    kind, _, name = spec.partition(":")
    if spec == "minilm":
        from model.minilm import load_minilm

        return load_minilm(device=device, max_tokens=max_tokens, layer=layer)
    if kind == "hf" and name:
        from model.huggingface import load_huggingface_text

        return load_huggingface_text(
            name, device=device, max_tokens=max_tokens, layer=layer, trust_remote_code=trust_remote_code
        )
    raise EncoderSpecError(f"text encoder {spec!r} is unknown; use minilm or hf:ID_OR_PATH")
