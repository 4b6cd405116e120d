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
from model.encoders.base import ImageFeatures, content_config, hash_module


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
                f"{spec} fails on an image of {size} px, the size in its preprocessing: {str(error).splitlines()[0]}"
            ) from error

    @torch.no_grad()
    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> ImageFeatures:
        """Return patch tokens `[B, P, C]` and L2-normalised embeddings `[B, D]`, float32, on the encoder's device."""
        pixel_values = torch.from_numpy(normalise(pixels_BHW3, self.preprocessing)).to(self._device)
        patch_tokens_BPC, image_embedding_BD = self.module(pixel_values)
        return ImageFeatures(
            patch_tokens_BPC=patch_tokens_BPC.float(), image_embedding_BD=F.normalize(image_embedding_BD.float(), dim=1)
        )
