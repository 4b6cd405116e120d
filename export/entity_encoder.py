"""Export the entity encoder (adaptor and text encoder) to ONNX, and compare it with the originals on synthetic input.

Shapes: B batch, P patches, C patch channels, T text tokens, L text channels, D embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from core.errors import EncoderSpecError, first_line
from core.files import atomic_write_bytes
from core.runtime import onnxruntime
from export.onnx import MIN_COSINE, export_module
from index.manifest import (
    ADAPTOR_FILE,
    ADAPTOR_INPUTS,
    ADAPTOR_OUTPUT,
    ENTITY_ENCODER_FOLDER,
    ENTITY_ENCODER_MANIFEST_FILE,
    TEXT_ENCODER_FILE,
    TEXT_INPUTS,
    TEXT_OUTPUT,
    TOKENIZER_FILE,
    EntityEncoder,
    FileEntry,
)
from model.adaptor import Adaptor
from model.checkpoint import Checkpoint
from model.encoders.text import MAX_CHARACTERS_PER_TOKEN, TokenStateEncoder

_SIZES = ((1, 1), (1, 9), (3, 17))  # batch, tokens


def export_entity_encoder(checkpoint: Checkpoint, bundle: Path) -> EntityEncoder:
    """Write `entity_side/` into a bundle of this checkpoint, its manifest last.

    Raises `EncoderSpecError` if the text encoder cannot be exported, or if a cosine to the originals is below 0.999.
    """
    text_encoder = checkpoint.text_encoder
    if not isinstance(text_encoder, TokenStateEncoder):
        raise EncoderSpecError("this text encoder cannot be exported; omit --live, and send embeddings instead")
    folder = bundle / ENTITY_ENCODER_FOLDER
    folder.mkdir(exist_ok=True)
    parity = {
        ADAPTOR_FILE: _export_adaptor(checkpoint, folder / ADAPTOR_FILE),
        TEXT_ENCODER_FILE: _export_text_encoder(text_encoder, folder / TEXT_ENCODER_FILE),
    }
    atomic_write_bytes(folder / TOKENIZER_FILE, text_encoder.tokenizer.to_str().encode())
    encoder = EntityEncoder(
        format_version=1,
        checkpoint_sha256=checkpoint.sha256,
        text_encoder=text_encoder.spec.rpartition("/")[2],
        patches=checkpoint.image_encoder.patches,
        patch_dim=checkpoint.image_encoder.patch_dim,
        text_dim=text_encoder.dim,
        max_characters=text_encoder.max_tokens * MAX_CHARACTERS_PER_TOKEN,
        parity=parity,
        files={file.name: FileEntry.of(file) for file in sorted(folder.glob("[!.m]*"))},
    )
    encoder.write(bundle / ENTITY_ENCODER_MANIFEST_FILE)
    return encoder


def _export_adaptor(checkpoint: Checkpoint, path: Path) -> dict[str, float]:
    adaptor: Adaptor = copy.deepcopy(checkpoint.adaptor).to("cpu", torch.float32).eval()
    adaptor.centre_D = None  # the bundle's image encoder subtracts it
    patches, generator = checkpoint.image_encoder.patches, torch.Generator().manual_seed(0)

    def sample(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
        text_mask_BT = torch.ones(batch, tokens, dtype=torch.bool)
        text_mask_BT[batch // 2, tokens // 2 :] = False  # a shorter text, or an empty one
        return (
            torch.randn(batch, patches, adaptor.config.patch_dim, generator=generator),
            torch.arange(batch) % 2 == 0,
            torch.randn(batch, tokens, adaptor.config.text_dim, generator=generator),
            text_mask_BT,
            F.normalize(torch.randn(batch, adaptor.config.embedding_dim, generator=generator), dim=1),
        )

    per_batch, per_token = _dynamic_dimensions()
    shapes = (per_batch, per_batch, per_token, per_token, per_batch)
    return _export(adaptor, path, sample, ADAPTOR_INPUTS, ADAPTOR_OUTPUT, shapes, "the adaptor")


class _LastStates(nn.Module):
    """A language model that returns the float32 states of one layer."""

    def __init__(self, model: nn.Module, layer: int | None) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        outputs: Any = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=self.layer is not None
        )
        states: torch.Tensor = outputs.last_hidden_state if self.layer is None else outputs.hidden_states[self.layer]
        return states.float()


def _export_text_encoder(encoder: TokenStateEncoder, path: Path) -> dict[str, float]:
    model = _LastStates(copy.deepcopy(encoder.model).to("cpu", torch.float32), encoder.layer).eval()
    generator = torch.Generator().manual_seed(0)

    def sample(batch: int, tokens: int) -> tuple[torch.Tensor, ...]:
        ids = torch.randint(
            encoder.tokenizer.get_vocab_size(), (batch, min(tokens, encoder.max_tokens)), generator=generator
        )
        return ids, torch.ones_like(ids)

    name = f"text encoder {encoder.spec}"
    _, per_token = _dynamic_dimensions()
    return _export(model, path, sample, TEXT_INPUTS, TEXT_OUTPUT, (per_token, per_token), name)


def _dynamic_dimensions() -> tuple[Mapping[int, Any], Mapping[int, Any]]:
    """Return the dynamic dimensions of arrays [B, ...] and [B, T, ...].

    This is a function because `torch.export` imports slowly, and most exports do not need it.
    """
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    return {0: batch}, {0: batch, 1: tokens}


@torch.no_grad()
def _export(
    module: nn.Module,
    path: Path,
    sample: Callable[[int, int], tuple[torch.Tensor, ...]],
    inputs: Sequence[str],
    output: str,
    dynamic_shapes: tuple[Mapping[int, Any], ...],
    name: str,
) -> dict[str, float]:
    """Write a module as an ONNX file and return its parity. `sample` makes inputs for a batch and token count.

    Raises `EncoderSpecError` if the module cannot be exported, or if the file differs from it.
    """
    try:
        export_module(module, sample(2, 5), path, inputs=inputs, outputs=(output,), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # the exporter's errors have no common base class
        raise EncoderSpecError(
            f"{name} cannot be exported to ONNX ({first_line(error)}); omit --live, and send embeddings instead"
        ) from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    min_cosine, max_abs_diff = 1.0, 0.0
    for batch, tokens in _SIZES:
        tensors = sample(batch, tokens)
        exact = module(*tensors).double().numpy()
        (found,) = session.run([output], {key: value.numpy() for key, value in zip(inputs, tensors, strict=True)})
        lengths = np.linalg.norm(exact, axis=-1) * np.linalg.norm(found, axis=-1)
        min_cosine = min(min_cosine, float(((exact * found).sum(-1) / lengths).min()))
        max_abs_diff = max(max_abs_diff, float(np.abs(exact - found).max()))
    if not min_cosine >= MIN_COSINE:
        raise EncoderSpecError(
            f"the ONNX file of {name} differs from the original: minimum cosine {min_cosine:.6f}, required {MIN_COSINE}"
        )
    return {"min_cosine": round(min_cosine, 6), "max_abs_diff": float(f"{max_abs_diff:.2g}")}
