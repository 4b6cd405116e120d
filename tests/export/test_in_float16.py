"""ONNX files that compute in float16, with float32 inputs and outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from export import onnx as onnx_step
from export.precision import InFloat16
from model.encoders import ImageEncoder
from model.encoders.huggingface import ClipTower

SIZE_PX = 32


@pytest.fixture(scope="module", params=["tiny", "clip"])
def module(request: pytest.FixtureRequest, torch_encoder: ImageEncoder) -> nn.Module:
    if request.param == "tiny":
        tiny: nn.Module = torch_encoder.module  # type: ignore[attr-defined]
        return tiny
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE_PX,
        patch_size=8, projection_dim=20,
    )  # fmt: skip
    tower = CLIPVisionModelWithProjection(config)
    return ClipTower(tower.vision_model, tower.visual_projection).eval().requires_grad_(False)


def export(module: nn.Module, path: Path) -> None:
    example = torch.zeros(2, 3, SIZE_PX, SIZE_PX)
    batch = {0: torch.export.Dim("batch")}
    names = {"inputs": (onnx_step.INPUT,), "outputs": onnx_step.OUTPUTS}
    onnx_step.export_module(InFloat16(module), (example,), path, dynamic_shapes=(batch,), **names)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def path(module: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    export(module, path := tmp_path_factory.mktemp("float16") / "half.onnx")
    return path


def test_it_computes_in_float16(module: nn.Module, path: Path, tmp_path: Path) -> None:
    export(module, again := tmp_path / "again.onnx")
    assert path.read_bytes() == again.read_bytes()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    graph = onnx.load(path).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in graph.initializer}
    casts = [node for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == 3  # one input and two outputs, nothing between
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    half = InFloat16(module)
    for count in (1, 2, 5):
        pixels_B3HW = torch.randn(count, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(count))
        found = session.run(list(onnx_step.OUTPUTS), {onnx_step.INPUT: pixels_B3HW.numpy()})
        with torch.no_grad():
            expected, halved = module(pixels_B3HW), half(pixels_B3HW)
        for of_file, of_half, of_module in zip(found, halved, expected, strict=True):
            assert of_file.dtype == np.float32
            assert of_half.dtype == torch.float32
            np.testing.assert_allclose(of_file, of_module, atol=0.02)
            np.testing.assert_allclose(of_half, of_module, atol=0.02)


def test_large_weights_are_external_data(
    module: nn.Module, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_step, "EXTERNAL_FROM_BYTES", 1000)
    export(module, large := tmp_path / "half.onnx")
    data = tmp_path / "half.onnx.data"
    weights_bytes = sum(2 * parameter.numel() for parameter in module.parameters())
    assert weights_bytes * 0.9 < data.stat().st_size < weights_bytes * 1.2 + 10_000  # half of float32
    pixels_B3HW = np.random.default_rng(0).normal(size=(3, 3, SIZE_PX, SIZE_PX)).astype(np.float32)
    found, expected = (
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {onnx_step.INPUT: pixels_B3HW})
        for file in (large, path)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_shared_weight_stays_shared() -> None:
    tied = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    tied[1].weight = tied[0].weight
    copied = InFloat16(tied).module
    assert copied[1].weight is copied[0].weight
    assert copied[0].weight.dtype == torch.float16
