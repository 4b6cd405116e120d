"""The other side of the claim: retrieval as the service does it (decode, encoder, exact search), without HTTP.

On a CPU that is the service's own code: ONNX Runtime and faiss. On a GPU both are torch in float16, since an encoder of
eight billion parameters is more than an ONNX file is made for: the arithmetic is the same.

Shapes: N entities, D embedding width, K results.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.generative.recognizer import clip_preprocessing
from benchmarks.generative.sizes import parameter_count
from benchmarks.synthetic import photograph
from core.runtime import faiss
from export.onnx_export import INPUT, OUTPUTS, export_module
from export.quantise import quantise
from imaging import Preprocessing, load_pixels, normalise
from index.candidates import CpuCandidates
from index.embeddings import Embeddings
from index.search import EntityIndex
from service.encoder import OnnxEncoder

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig

MAX_PIXELS = 64_000_000
TOP = 5
CALIBRATION_IMAGES = 32
_ROWS_AT_ONCE = 200_000


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """A CLIP image tower at 224 px and the width of its embedding."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_px: int
    embedding_dim: int
    size_px: int = 224

    def config(self) -> CLIPVisionConfig:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            hidden_size=self.width, intermediate_size=self.mlp_width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, image_size=self.size_px, patch_size=self.patch_px,
            projection_dim=self.embedding_dim,
        )  # fmt: skip


ENCODERS = {
    "vit-b32": EncoderShape(width=768, layers=12, heads=12, mlp_width=3072, patch_px=32, embedding_dim=512),
    "vit-b16": EncoderShape(width=768, layers=12, heads=12, mlp_width=3072, patch_px=16, embedding_dim=512),
    "vit-b32-2-layers": EncoderShape(width=768, layers=2, heads=12, mlp_width=3072, patch_px=32, embedding_dim=512),
    "vit-l14": EncoderShape(width=1024, layers=24, heads=16, mlp_width=4096, patch_px=14, embedding_dim=768),
    # The shape of the paper's, with CLIP's norms in place of its RMSNorm: the products are the same.
    "eva-clip-8b": EncoderShape(width=4096, layers=32, heads=32, mlp_width=20480, patch_px=14, embedding_dim=1280),
}


class ImageTower(nn.Module):
    """A CLIP image tower with random weights: patch tokens `[B, P, width]` and the embedding `[B, D]`, of length 1."""

    def __init__(self, shape: EncoderShape) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        self.tower = CLIPVisionModelWithProjection(shape.config())

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.tower(pixel_values=pixel_values)
        return out.last_hidden_state[:, 1:], F.normalize(out.image_embeds, dim=1)


def build_tower(shape: EncoderShape, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ImageTower:
    """In evaluation mode, weights drawn on `device`, which may be `meta`: then there are shapes only."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return ImageTower(shape).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


class Encoder(Protocol):
    """What the service's own encoder does."""

    preprocessing: Preprocessing

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> Any: ...


class Index(Protocol):
    def search(self, queries_BD: Any, top_k: int, /) -> tuple[Any, Any]: ...


class TorchEncoder:
    """A tower on a GPU, in the precision it is in; embeddings stay there, for `TorchIndex`."""

    def __init__(self, tower: nn.Module, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._tower = tower
        self._like = next(tower.parameters())

    @torch.inference_mode()
    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> torch.Tensor:
        pixel_values = torch.from_numpy(normalise(pixels_BHW3, self.preprocessing))
        embedding_BD: torch.Tensor = self._tower(pixel_values.to(self._like.device, self._like.dtype))[1]
        return embedding_BD


class TorchIndex:
    """Exact search by one matrix product over embeddings drawn at random; answers are waited for."""

    def __init__(self, entities: int, dim: int, *, device: str, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self._vectors_ND = torch.empty(entities, dim, device=device, dtype=dtype)
        for start in range(0, entities, _ROWS_AT_ONCE):
            rows = self._vectors_ND[start : start + _ROWS_AT_ONCE]
            drawn = torch.randn(rows.shape, generator=generator, device=device)
            rows.copy_(F.normalize(drawn, dim=1))

    @torch.inference_mode()
    def search(self, queries_BD: torch.Tensor, top_k: int, /) -> tuple[Any, Any]:
        scores_BK, rows_BK = (queries_BD @ self._vectors_ND.T).topk(top_k, dim=1)
        return rows_BK.cpu().numpy(), scores_BK.float().cpu().numpy()


def cpu_index(entities: int, dim: int) -> EntityIndex:
    """The service's own exact index, over embeddings that are drawn at random: time does not depend on them."""
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((entities, dim), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    flat = faiss.IndexFlatIP(dim)
    flat.add(vectors_ND)
    embeddings = Embeddings(dim, [vectors_ND.astype(np.float16)], [np.arange(entities)])
    return EntityIndex(CpuCandidates(flat), embeddings, {})


@dataclass(frozen=True, kw_only=True)
class Retrieved:
    row: int
    stages_ms: dict[str, float]


class RetrievalRecognizer:
    """An encoder and an exact index."""

    def __init__(self, encoder: Encoder, index: Index) -> None:
        self._encoder = encoder
        self._index = index

    def recognize(self, image: bytes) -> Retrieved:
        """One image file, to the row of the entity answered."""
        started = time.perf_counter()
        pixels_HW3 = load_pixels(image, self._encoder.preprocessing, max_pixels=MAX_PIXELS)
        decoded = time.perf_counter()
        embedding_1D = self._encoder.encode(pixels_HW3[None])
        if isinstance(embedding_1D, torch.Tensor) and embedding_1D.is_cuda:
            torch.cuda.synchronize()
        encoded = time.perf_counter()
        rows_1K, _ = self._index.search(embedding_1D, TOP)
        searched = time.perf_counter()
        stages = {"decode image": decoded - started, "encode": encoded - decoded, "search": searched - encoded}
        return Retrieved(row=int(rows_1K[0, 0]), stages_ms={name: 1000 * took for name, took in stages.items()})

    def recognize_batch(self, images: list[bytes]) -> None:
        """As many at once as are given, for throughput."""
        pixels = [load_pixels(image, self._encoder.preprocessing, max_pixels=MAX_PIXELS) for image in images]
        self._index.search(self._encoder.encode(np.stack(pixels)), TOP)


def write_encoder(name: str, folder: Path) -> tuple[Path, int]:
    """`NAME.onnx` in `folder`, if it is not there; its path and its number of parameters."""
    path = folder / f"{name}.onnx"
    torch.manual_seed(0)
    module = build_tower(ENCODERS[name])
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        size_px = ENCODERS[name].size_px
        export_module(
            module, (torch.zeros(2, 3, size_px, size_px),), path, inputs=(INPUT,), outputs=OUTPUTS,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    return path, parameter_count(module)


def quantised_file(path: Path, size_px: int, folder: Path, *, images: int = CALIBRATION_IMAGES) -> Path:
    """The file in int8, as `wikiclip export --int8` makes it, its ranges taken from made-up photographs."""
    out = folder / f"{path.stem}.int8.onnx"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = clip_preprocessing(size_px)
        pixels = [load_pixels(photograph(number), shape, max_pixels=MAX_PIXELS) for number in range(images)]
        quantise(path, out, np.stack(pixels), shape, input_name=INPUT)
    return out


def open_encoder(path: Path, shape: EncoderShape, *, threads: int) -> OnnxEncoder:
    return OnnxEncoder(
        path, clip_preprocessing(shape.size_px), input_name=INPUT, patches_name=OUTPUTS[0], embedding_name=OUTPUTS[1],
        embedding_dim=shape.embedding_dim, device="cpu", threads=threads,
    )  # fmt: skip
