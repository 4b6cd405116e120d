"""Models with random weights at the sizes that are compared: CLIP image towers, and LLaVA as the baseline.

Shapes: B images, P patches, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.synthetic import photograph
from export.onnx import Normalised, export_normalised
from export.precision import InFloat16, quantise
from imaging import Preprocessing, load_pixels

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, LlavaForConditionalGeneration

VOCABULARY = 32_000  # Vicuna's; the smaller language models have larger ones, which would only slow them down
_CALIBRATION_IMAGES = 32


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The shape of a CLIP image tower and the width of its embedding."""

    width: int
    layers: int
    heads: int
    patch_px: int
    embedding_dim: int = 512
    size_px: int = 224
    mlp_ratio: int = 4

    @property
    def patches(self) -> int:
        return (self.size_px // self.patch_px) ** 2

    def config(self) -> CLIPVisionConfig:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.width, intermediate_size=self.mlp_ratio * self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, image_size=self.size_px, patch_size=self.patch_px,
            projection_dim=self.embedding_dim,
        )  # fmt: skip


ENCODERS = {
    "vit-b32": EncoderShape(width=768, layers=12, heads=12, patch_px=32),
    "vit-b32-2-layers": EncoderShape(width=768, layers=2, heads=12, patch_px=32),
    "vit-l14": EncoderShape(width=1024, layers=24, heads=16, patch_px=14, embedding_dim=768),
    # The shape of the paper's encoder. CLIP's norms replace its RMSNorm; the matrix products are the same.
    "eva-clip-8b": EncoderShape(width=4096, layers=32, heads=32, patch_px=14, embedding_dim=1280, mlp_ratio=5),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A baseline: the shape of its image tower and of its Llama."""

    tower: EncoderShape
    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    tied: bool
    retrieval_dim: int = 768


# Both towers give 576 tokens. The smaller one takes a quarter of the time, which favours the baseline.
_VIT_L = EncoderShape(width=1024, layers=24, heads=16, size_px=336, patch_px=14)
_VIT_B = EncoderShape(width=768, layers=12, heads=12, size_px=384, patch_px=16)
_TINY = EncoderShape(width=128, layers=3, heads=4, size_px=64, patch_px=8)

SIZES = {
    "tiny": Size(
        tower=_TINY, width=128, layers=3, heads=4, key_value_heads=2, mlp_width=384, tied=True, retrieval_dim=128
    ),
    # The shapes of SmolLM-135M and Qwen2-0.5B.
    "135M": Size(tower=_VIT_B, width=576, layers=30, heads=9, key_value_heads=3, mlp_width=1536, tied=True),
    "0.5B": Size(tower=_VIT_B, width=896, layers=24, heads=14, key_value_heads=2, mlp_width=4864, tied=True),
    # Vicuna 7B and 13B, which AutoVER uses.
    "7B": Size(tower=_VIT_L, width=4096, layers=32, heads=32, key_value_heads=32, mlp_width=11008, tied=False),
    "13B": Size(tower=_VIT_L, width=5120, layers=40, heads=40, key_value_heads=40, mlp_width=13824, tied=False),
}


class ImageTower(nn.Module):
    """A CLIP image tower that returns patch tokens `[B, P, width]` and L2-normalised embeddings `[B, D]`."""

    def __init__(self, shape: EncoderShape) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.tower = CLIPVisionModelWithProjection(shape.config())
        self.eval().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixel_values=pixel_values)
        return out.last_hidden_state[:, 1:], F.normalize(out.image_embeds, dim=1)


def build_model(
    size: Size, *, image_token: int, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32, device: str
) -> tuple[LlavaForConditionalGeneration, nn.Linear]:
    """Return a LLaVA and its retrieval head (last state to `retrieval_dim`) in evaluation mode.

    On the device `meta` they have shapes only.
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=size.width, intermediate_size=size.mlp_width, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.key_value_heads, tie_word_embeddings=size.tied,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=size.tower.config(),
        text_config=language,
        image_token_index=image_token,
        image_seq_length=size.tower.patches,
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(dtype)
        head = nn.Linear(size.width, size.retrieval_dim, bias=False).to(dtype)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def parameter_count(*modules: nn.Module) -> int:
    """Return the number of parameters. Tied ones count once."""
    return sum(parameter.numel() for parameter in nn.ModuleList(modules).parameters())


def clip_preprocessing(size_px: int) -> Preprocessing:
    """Return the preprocessing of CLIP, which LLaVA uses too."""
    return Preprocessing(
        size_px=size_px, resize="shortest", crop="center", interpolation="bicubic",
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
    )  # fmt: skip


def write_encoder(name: str, path: Path, precision: str = "float32") -> int:
    """Write an encoder with random weights as ONNX, and return its number of parameters.

    `precision` is `float32`, `float16` or `int8`, which is calibrated on synthetic photographs.
    """
    shape = ENCODERS[name]
    torch.manual_seed(0)
    tower = ImageTower(shape)
    source = path.with_suffix(".float32.onnx") if precision == "int8" else path
    export_normalised(Normalised(InFloat16(tower) if precision == "float16" else tower), shape.size_px, source)
    if precision == "int8":
        preprocessing = clip_preprocessing(shape.size_px)
        images = (photograph(number) for number in range(_CALIBRATION_IMAGES))
        pixels = [load_pixels(image, preprocessing) for image in images]
        quantise(source, path, pixels, preprocessing)
        source.unlink()
    return parameter_count(tower)
