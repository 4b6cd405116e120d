"""The built-in image encoder for drawings: a small hybrid of convolutions and attention in place of CLIP.

Shapes: B batch, P = G * G patches, G = size_px / 16, C = D = embedding width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from core.errors import EncoderSpecError, first_line
from core.files import atomic_write_bytes
from imaging.preprocess import Preprocessing
from model.encoders.base import TorchImageEncoder

# Equal to demo/checkpoint/image_encoder.safetensors: a checkpoint is complete without this package's data.
BUILT_IN = Path(__file__).with_suffix(".safetensors")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """The network's sizes: channel widths at strides 2, 4, 8 and 16, residual blocks at 4 and 8, attention at 16."""

    widths: tuple[int, int, int, int] = (24, 48, 128, 256)
    blocks: tuple[int, int] = (1, 2)
    attention_layers: int = 3
    heads: int = 4
    mlp_ratio: float = 2.0
    embedding_dim: int = 128
    size_px: int = 96

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TinyConfig:
        return cls(**{**values, "widths": tuple(values["widths"]), "blocks": tuple(values["blocks"])})


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _convolution(width, width)
        self.second = _convolution(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class _Attention(nn.Module):
    """A pre-norm Transformer encoder layer."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, int(width * mlp_ratio)), nn.GELU(), nn.Linear(int(width * mlp_ratio), width)
        )

    def forward(self, x_BPC: torch.Tensor) -> torch.Tensor:
        patches, width = x_BPC.shape[1:]
        qkv = self.qkv(self.attention_norm(x_BPC)).reshape(-1, patches, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, patches, width)
        x_BPC = x_BPC + self.out(mixed)
        mlp_BPC: torch.Tensor = self.mlp(self.mlp_norm(x_BPC))
        return x_BPC + mlp_BPC


class TinyEncoder(nn.Module):
    """Map pixels `[B, 3, H, W]` to patch tokens `[B, P, D]` and L2-normalised image embeddings `[B, D]`.

    A learned saliency weights each patch token. Its mean over the patches is one, so the pooled embedding before
    normalisation is the mean patch token: both share one space, and background counts for little in either.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        w2, w4, w8, w16 = config.widths
        self.stem = _convolution(3, w2, 2)
        self.stage4 = nn.Sequential(
            _convolution(w2, w4, 2), nn.ReLU(), *(_Residual(w4) for _ in range(config.blocks[0]))
        )
        self.stage8 = nn.Sequential(
            _convolution(w4, w8, 2), nn.ReLU(), *(_Residual(w8) for _ in range(config.blocks[1]))
        )
        self.stage16 = _convolution(w8, w16, 2)
        grid = config.size_px // 16
        self.position = nn.Parameter(torch.zeros(1, w16, grid, grid))
        nn.init.normal_(self.position, std=0.02)
        self.attention = nn.Sequential(
            *(_Attention(w16, config.heads, config.mlp_ratio) for _ in range(config.attention_layers))
        )
        self.norm = nn.LayerNorm(w16)
        self.saliency = nn.Linear(w16, 1)
        self.projection = nn.Linear(w16, config.embedding_dim, bias=False)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.stage16(self.stage8(self.stage4(F.relu(self.stem(pixel_values)))))
        position: torch.Tensor = self.position
        if x.shape[-2:] != position.shape[-2:]:  # smaller images early in training
            position = F.interpolate(position, x.shape[-2:], mode="bilinear", align_corners=False)
        tokens_BPC = self.norm(self.attention((x + position).flatten(2).transpose(1, 2)))
        weight_BP1 = self.saliency(tokens_BPC).softmax(1) * tokens_BPC.shape[1]
        patch_tokens_BPD = weight_BP1 * self.projection(tokens_BPC)
        return patch_tokens_BPD, F.normalize(patch_tokens_BPD.mean(1), dim=-1)


def save_tiny(
    module: TinyEncoder, preprocessing: Preprocessing, path: Path, *, notes: dict[str, Any] | None = None
) -> None:
    """Write float16 weights to one safetensors file, with config, preprocessing and `notes` as JSON metadata."""
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in module.state_dict().items()
    }
    metadata = {
        "config": json.dumps(asdict(module.config)),
        "preprocessing": json.dumps(preprocessing.to_dict()),
        "notes": json.dumps(notes or {}, sort_keys=True),
    }
    atomic_write_bytes(path, safetensors.torch.save(weights, metadata))


def read_tiny(path: Path) -> tuple[TinyEncoder, Preprocessing, dict[str, Any]]:
    """Return the network (float32, evaluation mode), its preprocessing and notes. Raises `EncoderSpecError`."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        module = TinyEncoder(TinyConfig.from_dict(json.loads(metadata["config"])))
        preprocessing = Preprocessing.from_dict(json.loads(metadata["preprocessing"]))
        notes = json.loads(metadata["notes"])
        module.load_state_dict(weights)
    except FileNotFoundError:
        raise EncoderSpecError(
            f"{path} does not exist; train the tiny encoder with `make tiny` or name another file"
        ) from None
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise EncoderSpecError(f"{path} is not a tiny encoder: {first_line(error)}") from error
    return module.eval(), preprocessing, notes


def load_tiny(path: Path | None = None, *, device: torch.device | str = "cpu") -> TorchImageEncoder:
    """Load the built-in encoder, or the one in `path`. Raises `EncoderSpecError`."""
    module, preprocessing, _ = read_tiny(path or BUILT_IN)
    spec = f"tiny:{path}" if path else "tiny"
    return TorchImageEncoder(
        module, preprocessing, saved_config=asdict(module.config), spec=spec, device=torch.device(device)
    )
