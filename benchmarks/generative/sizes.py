"""How large the baseline is: LLaVA's architecture at the sizes that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

VOCABULARY = 32_000  # Vicuna's; the smaller language models have larger ones, which would only cost them time


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A CLIP image tower; the language model sees `(size_px / patch_px)²` tokens."""

    width: int
    layers: int
    heads: int
    size_px: int
    patch_px: int

    @property
    def tokens(self) -> int:
        return (self.size_px // self.patch_px) ** 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """A baseline: its image tower, and a Llama of this shape."""

    tower: Tower
    width: int
    layers: int
    heads: int
    key_value_heads: int
    mlp_width: int
    tied: bool
    retrieval_dim: int = 768


# Like CLIP ViT-L/14-336 the smaller tower gives 576 tokens, in a quarter of the time: to the baseline's advantage.
_VIT_L = Tower(width=1024, layers=24, heads=16, size_px=336, patch_px=14)
_VIT_B = Tower(width=768, layers=12, heads=12, size_px=384, patch_px=16)
_TINY = Tower(width=128, layers=3, heads=4, size_px=64, patch_px=8)

SIZES = {
    "tiny": Size(
        tower=_TINY, width=128, layers=3, heads=4, key_value_heads=2, mlp_width=384, tied=True, retrieval_dim=128
    ),
    # The shapes of SmolLM-135M and Qwen2-0.5B.
    "135M": Size(tower=_VIT_B, width=576, layers=30, heads=9, key_value_heads=3, mlp_width=1536, tied=True),
    "0.5B": Size(tower=_VIT_B, width=896, layers=24, heads=14, key_value_heads=2, mlp_width=4864, tied=True),
    # Vicuna 7B and 13B, as AutoVER has them.
    "7B": Size(tower=_VIT_L, width=4096, layers=32, heads=32, key_value_heads=32, mlp_width=11008, tied=False),
    "13B": Size(tower=_VIT_L, width=5120, layers=40, heads=40, key_value_heads=40, mlp_width=13824, tied=False),
}


def build_model(
    size: Size, *, image_token: int, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32, device: str
) -> tuple[LlavaForConditionalGeneration, torch.nn.Linear]:
    """A LLaVA of random weights and its retrieval head (last state to `retrieval_dim`), in evaluation mode.

    Weights are drawn on `device`, which may be `meta`: then there are shapes only.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower: dict[str, Any] = {
        "hidden_size": size.tower.width, "intermediate_size": 4 * size.tower.width,
        "num_hidden_layers": size.tower.layers, "num_attention_heads": size.tower.heads,
        "image_size": size.tower.size_px, "patch_size": size.tower.patch_px,
    }  # fmt: skip
    language: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": size.width, "intermediate_size": size.mlp_width,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads, "tie_word_embeddings": size.tied,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**language),
        image_token_index=image_token,
        image_seq_length=size.tower.tokens,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
            head = torch.nn.Linear(size.width, size.retrieval_dim, bias=False)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def parameter_count(*modules: torch.nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
