"""A module as ONNX that computes in float16, which a GPU does faster. What goes in and comes out is float32."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.onnx_export import export_module


class _InHalf(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output.float() for output in self.module(*(each.half() for each in inputs)))


def export_float16(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Mapping[int, Any], ...],
) -> None:
    """As `export_module`, in float16. The module itself is left as it is."""
    half = _InHalf(copy.deepcopy(module).half()).eval()
    # What a module takes as *inputs has one entry in dynamic_shapes, of all of them.
    export_module(half, example, path, inputs=inputs, outputs=outputs, dynamic_shapes=(dynamic_shapes,))  # type: ignore[arg-type]
