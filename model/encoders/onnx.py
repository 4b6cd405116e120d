"""`onnx:PATH`: an image encoder in an ONNX file, with its preprocessing in a JSON file of the same name.

Shapes: B batch, P patches, C patch channels, D embedding, H = W = size_px.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from core.errors import EncoderSpecError
from core.files import sha256_file
from imaging.preprocess import Preprocessing, normalise
from model.encoders.base import ImageFeatures

_INPUT = "pixel_values"
_OUTPUTS = ["patch_tokens", "image_embedding"]


class OnnxImageEncoder:
    """A frozen image tower (`ImageEncoder`) run by ONNX Runtime.

    The file maps `pixel_values` float32 `[B, 3, H, W]` to `patch_tokens` `[B, P, C]` and `image_embedding` `[B, D]`.
    Raises `EncoderSpecError` if it does not, or if it or its preprocessing is missing or unreadable.
    """

    def __init__(self, path: Path, *, spec: str, device: torch.device) -> None:
        self.spec = spec
        self.onnx_path = path
        if not path.is_file():
            raise EncoderSpecError(f"{spec}: {path} does not exist; check the path")
        self.preprocessing = _read_preprocessing(spec, path.with_suffix(".json"))
        self.content_hash = _hash(path, self.preprocessing)
        self._session = _open_session(spec, path, device)
        self._device = device
        size = self.preprocessing.size_px
        try:
            features = self.encode(np.zeros((2, size, size, 3), np.uint8))
            _, self.patches, self.patch_dim = features.patch_tokens_BPC.shape
            _, self.embedding_dim = features.image_embedding_BD.shape
        except Exception as error:  # ONNX Runtime's errors have no public base class
            raise EncoderSpecError(
                f"{spec} fails on two images of {size} px; it needs one input `{_INPUT}` float32 [B, 3, H, W] with any "
                f"B and the `size_px` of {path.with_suffix('.json').name} as H and W, and outputs `patch_tokens` "
                f"[B, P, C] and `image_embedding` [B, D]: {str(error).splitlines()[0]}"
            ) from error

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures:
        """Return patch tokens `[B, P, C]` and L2-normalised embeddings `[B, D]`, float32, on the encoder's device."""
        pixel_values = normalise(pixels_BHW3, self.preprocessing)
        patch_tokens, image_embedding = self._session.run(_OUTPUTS, {_INPUT: pixel_values})
        return ImageFeatures(
            patch_tokens_BPC=torch.from_numpy(patch_tokens).to(self._device).float(),
            image_embedding_BD=F.normalize(torch.from_numpy(image_embedding).to(self._device).float(), dim=1),
        )


def _read_preprocessing(spec: str, path: Path) -> Preprocessing:
    try:
        return Preprocessing.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EncoderSpecError(f"{spec} needs its preprocessing in {path}; write that file") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EncoderSpecError(f"{spec}: {path} is not a valid preprocessing: {error}") from error


def _hash(path: Path, preprocessing: Preprocessing) -> str:
    """Hash the file, its external data and the preprocessing."""
    digest = hashlib.sha256(json.dumps(preprocessing.to_dict(), sort_keys=True).encode())
    for file in [path, *external_data(path)]:
        digest.update(f"\n{sha256_file(file)}".encode())
    return digest.hexdigest()


def external_data(path: Path) -> list[Path]:
    """Return the sorted files with an ONNX file's large tensors. Raises `EncoderSpecError` if one is missing."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError; protobuf is not a dependency of ours
        raise EncoderSpecError(f"onnx:{path} is not an ONNX file: {str(error).splitlines()[0]}") from error
    names = {ExternalDataInfo(tensor).location for tensor in graph.initializer if uses_external_data(tensor)}
    files = [path.parent / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise EncoderSpecError(f"onnx:{path}: its external data {file.name} is missing; put it in the same folder")
    return files


def _open_session(spec: str, path: Path, device: torch.device) -> Any:
    from core.runtime import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # ONNX Runtime's errors have no public base class
        raise EncoderSpecError(f"{spec} cannot be opened: {str(error).splitlines()[0]}") from error
    # Without the provider, or if it fails to start, ONNX Runtime only warns and runs on the CPU.
    if session.get_providers()[0] != provider:
        raise EncoderSpecError(
            f"{spec}: {provider} did not start; install onnxruntime-gpu and the CUDA libraries, or use --device cpu"
        )
    return session
