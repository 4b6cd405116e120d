"""The image encoder computing in float16 beside the float one, and how far it is from the original.

Shapes: B batch, P patches, C patch channels, D embedding width, H = W = size_px.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from core.errors import EncoderSpecError
from export.onnx_export import (
    MIN_COSINE,
    Normalised,
    compare,
    export_normalised,
    fold_centre,
    measure_parity,
)
from index.manifest import FLOAT16_ENCODER_FILE, Float16Entry
from model.encoders import ImageEncoder


class InFloat16(nn.Module):
    """A copy of a module on the CPU, in evaluation mode and in float16, that takes and gives float32.

    Tensors of any shape and number; those that are no floats (ids, masks) go in and come out as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Its tensors are put in place of the originals while it is copied: a copy in float32 may take up 30 GB.
        halves: dict[int, Any] = {
            id(parameter): nn.Parameter(_half(parameter), requires_grad=False) for parameter in module.parameters()
        }
        halves.update({id(buffer): _half(buffer) for buffer in module.buffers()})
        self.module = copy.deepcopy(module, halves).eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.module(*(_cast(tensor, torch.float16) for tensor in inputs))
        if isinstance(outputs, torch.Tensor):
            return _cast(outputs, torch.float32)
        return tuple(_cast(tensor, torch.float32) for tensor in outputs)


def add_float16(encoder: ImageEncoder, bundle: Path, centre_D: torch.Tensor | None = None) -> Float16Entry:
    """Write `image_encoder.float16.onnx` into a bundle, as `export_image_encoder` writes the float file.

    ONNX Runtime computes the file in float32 on a CPU, where nothing overflows. So the file is compared there for its
    operators, and torch in float16 for its arithmetic: the worse of the two is told. Raises `EncoderSpecError` where
    the encoder has no torch module, or where its embeddings are further than a cosine of 0.999 or no numbers.
    """
    path = bundle / FLOAT16_ENCODER_FILE
    module = Normalised(InFloat16(torch_module(encoder)))

    @torch.no_grad()
    def run(pixels_B3HW: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.float32]]:
        patch_tokens_BPC, embedding_BD = module(torch.from_numpy(pixels_B3HW))
        if centre_D is not None:
            embedding_BD = embedding_BD - centre_D.cpu()
        return patch_tokens_BPC.numpy(), embedding_BD.numpy()

    parity = compare(encoder, run, centre_D)
    if parity.holds(MIN_COSINE):
        export_normalised(module, encoder.preprocessing.size_px, path)
        if centre_D is not None:
            fold_centre(path, centre_D)
        parity = parity.with_worst_of(measure_parity(encoder, path, centre_D))
    if not parity.holds(MIN_COSINE):
        raise EncoderSpecError(
            f"the encoder does not bear float16: least cosine {parity.min_cosine:.6f} to its own embeddings, "
            f"{MIN_COSINE} is wanted; go on with --resume, without --float16"
        )
    return Float16Entry(file=FLOAT16_ENCODER_FILE, **asdict(parity))


def torch_module(encoder: ImageEncoder) -> nn.Module:
    """The torch module that a file in float16 is made of. Raises `EncoderSpecError` where there is none."""
    module: nn.Module | None = getattr(encoder, "module", None)
    if module is None:
        raise EncoderSpecError(
            f"--float16 needs an image encoder in torch, and {encoder.spec} is an ONNX file; leave --float16 out, or "
            "convert the file by hand, with float32 in and out, and train and export with that"
        )
    return module


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return _cast(tensor.detach().to("cpu"), torch.float16)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
