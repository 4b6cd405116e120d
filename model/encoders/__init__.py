"""Frozen image and text encoders, opened by a spec such as `tiny` or `hf:ID_OR_PATH`."""

from __future__ import annotations

from pathlib import Path

import torch

from core.errors import EncoderSpecError, UserError
from model.encoders.base import ImageEncoder, ImageFeatures, TextEncoder, TextFeatures

__all__ = [
    "ImageEncoder",
    "ImageFeatures",
    "TextEncoder",
    "TextFeatures",
    "open_image_encoder",
    "open_text_encoder",
    "resolve_device",
    "with_revision",
]


def open_image_encoder(
    spec: str, *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> ImageEncoder:
    """Open the image encoder of a spec: `photo`, `tiny`, `tiny:PATH`, `onnx:PATH`, `hf:ID_OR_PATH` or `hf:ID@REVISION`.

    Raises `EncoderSpecError`.
    """
    device = resolve_device(str(device))
    kind, _, name = spec.partition(":")
    if kind == "tiny":
        from model.encoders.tiny import load_tiny

        return load_tiny(Path(name) if name else None, device=device)
    if spec == "photo":
        from model.encoders.photo import load_photo

        return load_photo(device=device)
    if kind == "onnx" and name:
        from model.encoders.onnx import OnnxImageEncoder

        return OnnxImageEncoder(Path(name), spec=spec, device=device)
    if kind == "hf" and name:
        from model.encoders.huggingface import load_huggingface_image

        return load_huggingface_image(name, device=device, trust_remote_code=trust_remote_code)
    raise EncoderSpecError(f"image encoder {spec!r} is unknown; use photo, tiny, onnx:PATH or hf:ID_OR_PATH")


def open_text_encoder(
    spec: str,
    *,
    device: torch.device | str = "cpu",
    max_tokens: int = 256,
    layer: int | None = None,
    trust_remote_code: bool = False,
) -> TextEncoder:
    """Open the text encoder of a spec: `minilm` or `hf:ID_OR_PATH`. Raises `EncoderSpecError`.

    `layer` is the hidden state to read, numbered as in transformers. None is the model's last hidden state.
    """
    device = resolve_device(str(device))
    kind, _, name = spec.partition(":")
    if spec == "minilm":
        from model.encoders.text import load_minilm

        return load_minilm(device=device, max_tokens=max_tokens, layer=layer)
    if kind == "hf" and name:
        from model.encoders.huggingface import load_huggingface_text

        return load_huggingface_text(
            name, device=device, max_tokens=max_tokens, layer=layer, trust_remote_code=trust_remote_code
        )
    raise EncoderSpecError(f"text encoder {spec!r} is unknown; use minilm or hf:ID_OR_PATH")


def with_revision(revision: str | None, *specs: str | None) -> list[str | None]:
    """Add a revision to the one `hf:` spec among these. Raises `UserError` if there is none, or more than one."""
    if revision is None:
        return list(specs)
    found = [spec for spec in specs if spec is not None and spec.startswith("hf:")]
    if len(found) != 1:
        names = "needs an hf: encoder" if not found else f"could mean {' or '.join(found)}"
        raise UserError(f"--revision {revision} {names}; write hf:ID@{revision} where you name the encoder")
    return [f"{spec}@{revision}" if spec == found[0] else spec for spec in specs]


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto` (CUDA if available), `cpu`, `cuda` or `cuda:N`.

    Raises `UserError` for any other name, and for a GPU that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"{name!r} is not a supported device; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"this machine has no device {name}; use --device cpu")
    return device
