"""A module as an ONNX file that computes in float16, for GPUs; float32 goes in and comes out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.onnx_export import export_module


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


def export_float16(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Mapping[int, Any], ...],
) -> None:
    """As `export_module`, computing in float16; the module itself stays as and where it is.

    A file of what float16 cannot hold (values beyond 65,504) is written like any other: its results are for the caller
    to look at, and not with ONNX Runtime on a CPU, which computes such files in float32.
    """
    # The inputs of `InFloat16` are one argument to the exporter, a tuple.
    export_module(InFloat16(module), example, path, inputs=inputs, outputs=outputs, dynamic_shapes=(dynamic_shapes,))


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return _cast(tensor.detach().to("cpu"), torch.float16)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
