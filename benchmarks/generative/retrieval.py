"""The other side of the claim: retrieval as the service does it (decode, ONNX encoder, exact search), without HTTP.

Shapes: N entities, D embedding width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import nn

from export.onnx_export import INPUT, OUTPUTS, export_module
from imaging import Preprocessing, load_pixels
from index.candidates import CpuCandidates
from index.embeddings import Embeddings
from index.search import EntityIndex
from service.encoder import OnnxEncoder

MAX_PIXELS = 64_000_000
VIT_B32 = "vit-b32"


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    row: int
    stages_ms: dict[str, float]


class RetrievalRecognizer:
    """An encoder file, and an exact index over embeddings that are drawn at random: time does not depend on them."""

    def __init__(self, encoder: OnnxEncoder, embedding_dim: int, entities: int, *, threads: int) -> None:
        rng = np.random.default_rng(0)
        vectors_ND = rng.standard_normal((entities, embedding_dim), dtype=np.float32)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        flat = faiss.IndexFlatIP(embedding_dim)
        flat.add(vectors_ND)
        embeddings = Embeddings(embedding_dim, [vectors_ND.astype(np.float16)], [np.arange(entities)])
        self._encoder = encoder
        self._index = EntityIndex(CpuCandidates(flat), embeddings, {})
        faiss.omp_set_num_threads(threads)

    def recognize(self, image: bytes) -> Retrieved:
        """One image file, to the row of the entity answered."""
        started = time.perf_counter()
        pixels_HW3 = load_pixels(image, self._encoder.preprocessing, max_pixels=MAX_PIXELS)
        decoded = time.perf_counter()
        embedding_1D = self._encoder.encode(pixels_HW3[None])
        encoded = time.perf_counter()
        rows_1K, _ = self._index.search(embedding_1D, 5)
        searched = time.perf_counter()
        stages = {"decode": decoded - started, "encode": encoded - decoded, "search": searched - encoded}
        return Retrieved(row=int(rows_1K[0, 0]), stages_ms={name: 1000 * took for name, took in stages.items()})

    def recognize_batch(self, images: list[bytes]) -> None:
        """As many at once as are given, for throughput."""
        pixels = [load_pixels(image, self._encoder.preprocessing, max_pixels=MAX_PIXELS) for image in images]
        self._index.search(self._encoder.encode(np.stack(pixels)), 5)


class _VitB32(nn.Module):
    """CLIP's ViT-B/32 image tower with random weights: patch tokens `[B, 49, 768]`, embedding `[B, 512]`."""

    def __init__(self) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=32, projection_dim=512,
        )  # fmt: skip
        self.tower = CLIPVisionModelWithProjection(config)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixel_values=pixel_values)
        return out.last_hidden_state[:, 1:], nn.functional.normalize(out.image_embeds, dim=1)


def write_vit_b32(folder: Path) -> tuple[Path, int]:
    """`vit-b32.onnx` in `folder`, if it is not there; its path and its number of parameters."""
    path = folder / f"{VIT_B32}.onnx"
    torch.manual_seed(0)
    module = _VitB32().eval()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        export_module(
            module, (torch.zeros(2, 3, 224, 224),), path, inputs=(INPUT,), outputs=OUTPUTS,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    return path, sum(parameter.numel() for parameter in module.parameters())


def quantised_file(path: Path, folder: Path) -> Path:
    """The file with its matrix products in int8: u8 activations quantised as they come, s8 weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = folder / f"{path.stem}.int8.onnx"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        quantize_dynamic(
            path, out, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
    return out


def open_encoder(path: Path, preprocessing: Preprocessing, embedding_dim: int, *, threads: int) -> OnnxEncoder:
    return OnnxEncoder(
        path, preprocessing, input_name=INPUT, patches_name=OUTPUTS[0], embedding_name=OUTPUTS[1],
        embedding_dim=embedding_dim, device="cpu", threads=threads,
    )  # fmt: skip
