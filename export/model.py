"""What an export embeds the catalog with: a trained checkpoint, or an image encoder alone.

Shapes: B batch, D embedding width, H = W = size_px.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.config import ExportConfig
from export.onnx import torch_module
from model.checkpoint import Checkpoint, encoder_identity
from model.encoders import ImageEncoder, open_image_encoder


@dataclass(frozen=True, kw_only=True)
class ImageModel:
    """An image encoder without training: queries and entities have the embeddings of their images. Texts have none."""

    image_encoder: ImageEncoder
    device: torch.device
    text_encoder: None = None
    centre: None = None
    sha256: None = None

    @torch.no_grad()
    def embed_queries(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return the L2-normalised embeddings `[B, D]` of images."""
        embeddings_BD: npt.NDArray[np.float32] = self.image_encoder.encode(pixels_BHW3).image_embedding_BD.cpu().numpy()
        return embeddings_BD


ExportModel = Checkpoint | ImageModel


def load_model(config: ExportConfig, device: torch.device) -> ExportModel:
    """Load the configured checkpoint or image encoder.

    Raises what `Checkpoint.load` raises, and `EncoderSpecError` if `--float16` does not apply to the image encoder.
    """
    model: ExportModel
    if config.checkpoint is not None:
        model = Checkpoint.load(
            config.checkpoint,
            image_encoder_spec=config.image_encoder,
            text_encoder_spec=config.text_encoder,
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
    else:
        assert config.image_encoder is not None, "check_inputs asks for it"
        encoder = open_image_encoder(config.image_encoder, device=device, trust_remote_code=config.trust_remote_code)
        model = ImageModel(image_encoder=encoder, device=device)
    if config.float16:
        torch_module(model.image_encoder)
    return model


def describe_model(model: ExportModel) -> dict[str, Any]:
    """Return the manifest's `model`: the encoders and the adaptor, or an image encoder alone."""
    if isinstance(model, ImageModel):
        return {
            "image_encoder": encoder_identity(model.image_encoder)["spec"],
            "text_encoder": None,
            "image_encoder_hash": model.image_encoder.content_hash,
            "text_encoder_hash": None,
            "adaptor": None,
            "checkpoint_sha256": None,
        }
    return {
        "image_encoder": model.values["image_encoder"]["spec"],
        "text_encoder": model.values["text_encoder"]["spec"],
        "image_encoder_hash": model.image_encoder.content_hash,
        "text_encoder_hash": model.text_encoder.content_hash,
        "adaptor": model.values["adaptor"],
        "checkpoint_sha256": model.sha256,
        "logit_scale": model.logit_scale,
    }
