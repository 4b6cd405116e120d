"""An image encoder made of a torch module and its preprocessing.

Shapes: B batch, P patches, C patch channels, D embedding, H = W = size_px.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import EncoderSpecError
from imaging.preprocess import Preprocessing, normalise
from model.encoders import ImageFeatures
from model.hashing import defining, hash_module


class TorchImageEncoder:
    """A frozen image tower (`ImageEncoder`) around a module with `forward(pixel_values [B, 3, H, W])`.

    The module returns `(patch_tokens [B, P, C], image_embedding [B, D])` and is what the exporter writes as ONNX. On a
    GPU it runs in the precision it is stored in, on a CPU in float32. Raises `EncoderSpecError` if a trial run does not
    give that. `saved_config` is the network's config as its file has it: part of the content hash.
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
        self.content_hash = hash_module(module, {"config": defining(saved_config), **preprocessing.to_dict()})
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
                f"{spec} fails on a {size} px image, the size its preprocessing gives: {str(error).splitlines()[0]}"
            ) from error

    @torch.no_grad()
    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures:
        """Patch tokens `[B, P, C]` and L2-normalised image embeddings `[B, D]`, float32, on the encoder's device."""
        pixel_values = torch.from_numpy(normalise(pixels_BHW3, self.preprocessing)).to(self._device)
        patch_tokens_BPC, image_embedding_BD = self.module(pixel_values)
        return ImageFeatures(
            patch_tokens_BPC=patch_tokens_BPC.float(),
            image_embedding_BD=F.normalize(image_embedding_BD.float(), dim=1),
        )
