"""Token states of any frozen language model of transformers, batched by length.

Shapes: B texts, T tokens of the longest text, C hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer
from torch import nn

from core.errors import EncoderSpecError
from model.encoders import TextFeatures
from model.hashing import defining, hash_module

_TOKENS_PER_BATCH = 8192  # padding included; bounds memory whatever the lengths
# Tokenising is linear in the text, and a record may hold megabytes of it. No language has tokens this long on average.
MAX_CHARACTERS_PER_TOKEN = 64
_PROBE = "The Eiffel Tower (French: tour Eiffel), 330 m; ときどき Москва éÉ  🦒\n2nd-line's end."


class TokenStateEncoder:
    """A frozen text tower (`TextEncoder`): the states of one layer at each of the first `max_tokens` tokens.

    `layer` counts as transformers' `hidden_states` do (0 the embeddings, -1 the last layer); None is the model's own
    `last_hidden_state`, after its final norm. `saved_config` is the model's config as its file has it: part of the
    content hash. Raises `EncoderSpecError` where model and settings do not fit.
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
        self.dim: int = _hidden_size(config, spec)
        _check_fits(config, spec, max_tokens, layer)
        self.spec = spec
        self.max_tokens = max_tokens
        self.layer = layer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self._tokenizer = tokenizer
        # By what it does and not by how a version of `tokenizers` writes it down.
        tokenization = {"vocabulary": tokenizer.get_vocab(), "probe": tokenizer.encode(_PROBE).ids}
        settings = {
            "config": defining(saved_config),
            "tokenizer": tokenization,
            "max_tokens": max_tokens,
            "layer": layer,
        }
        self.content_hash = hash_module(model, settings)
        config.use_cache = False  # one pass over each text: keys and values are never needed again
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._device = device

    @property
    def model(self) -> nn.Module:
        """The network itself, for an export."""
        return self._model

    @property
    def vocabulary_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def tokenizer_json(self) -> str:
        """The tokenizer as this encoder uses it, in the form of `tokenizer.json`."""
        return str(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> TextFeatures:
        """Token states `[B, T, C]` float32 in the order given, zero where there is no token; on the encoder's device.

        An empty or blank text has no token at all: its mask row is all false, which to the adaptor means no text.
        """
        return self.encode_tokens(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of at most `max_tokens` tokens of each text, none of a blank one. May run beside `encode_tokens`."""
        encodings = self._encodings(texts)
        return [encoding.ids if text.strip() else [] for text, encoding in zip(texts, encodings, strict=True)]

    def encode_tokens(self, rows: Sequence[Sequence[int]]) -> TextFeatures:
        """As `encode`, of texts that `tokenize` has taken apart. They pass the model batched by length."""
        longest = max((len(row) for row in rows), default=0)
        tokens_BTC = torch.zeros(len(rows), longest, self.dim, device=self._device)
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool, device=self._device)
        for batch in _by_length(rows):
            width = len(rows[batch[-1]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            attend = torch.zeros(len(batch), width, dtype=torch.long)
            for position, index in enumerate(batch):
                length = len(rows[index])
                ids[position, :length] = torch.tensor(rows[index], dtype=torch.long)
                attend[position, :length] = 1
            ids, attend = ids.to(self._device), attend.to(self._device)
            states = self._states(ids, attend).float() * attend[:, :, None]
            where = torch.tensor(batch, device=self._device)
            tokens_BTC[where, :width] = states
            mask_BT[where, :width] = attend.bool()
        return TextFeatures(text_tokens_BTC=tokens_BTC, mask_BT=mask_BT)

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        longest = self.max_tokens * MAX_CHARACTERS_PER_TOKEN
        encodings: list[Encoding] = self._tokenizer.encode_batch([text.strip()[:longest] for text in texts])
        return encodings

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where each token of `encode` stands in its text: start and end in characters, equal for a special token."""
        spans = []
        for text, encoding in zip(texts, self._encodings(texts), strict=True):
            before = len(text) - len(text.lstrip())
            spans.append([(start + before, end + before) for start, end in encoding.offsets] if text.strip() else [])
        return spans

    @torch.no_grad()
    def _states(self, ids: torch.Tensor, attend: torch.Tensor) -> torch.Tensor:
        outputs = self._model(input_ids=ids, attention_mask=attend, output_hidden_states=self.layer is not None)
        states: torch.Tensor = outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]
        return states


def _by_length(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of the rows that are not empty, shortest first, at most `_TOKENS_PER_BATCH` padded tokens a batch."""
    batch: list[int] = []
    for index in sorted((index for index, row in enumerate(rows) if row), key=lambda index: len(rows[index])):
        if batch and (len(batch) + 1) * len(rows[index]) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _hidden_size(config: Any, spec: str) -> int:
    size = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(size, int):
        raise EncoderSpecError(
            f"{spec} has no hidden_size in its config; name a causal language model or a text encoder"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderSpecError(f"{spec} is an encoder-decoder; name a causal language model or a text encoder")
    return size


def _check_fits(config: Any, spec: str, max_tokens: int, layer: int | None) -> None:
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if max_tokens < 1 or (positions is not None and max_tokens > positions):
        raise EncoderSpecError(f"{spec} takes 1 to {positions} tokens, {max_tokens} are asked for; lower max_tokens")
    layers: int = text_config.num_hidden_layers
    if layer is not None and not -layers - 1 <= layer <= layers:
        raise EncoderSpecError(f"{spec} has layers {-layers - 1} to {layers}, layer {layer} is asked for")
