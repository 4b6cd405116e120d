"""The ONNX file of an image encoder: parity at any batch size, and no data of the machine that made it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from core.errors import EncoderSpecError
from export.onnx import export_image_encoder, measure_parity
from imaging import Preprocessing, normalise
from model.encoders import ImageEncoder, open_image_encoder
from model.encoders.base import TorchImageEncoder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, torch_encoder: ImageEncoder) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    parity = export_image_encoder(torch_encoder, folder)
    assert parity.min_cosine > 0.99999
    assert parity.max_abs_diff < 1e-3
    return folder / "image_encoder.onnx"


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_any_batch(exported: Path, torch_encoder: ImageEncoder, batch: int) -> None:
    size_px = torch_encoder.preprocessing.size_px
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (batch, size_px, size_px, 3), np.uint8)
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    patch_tokens, embedding = session.run(
        ["patch_tokens", "image_embedding"], {"pixel_values": normalise(pixels_BHW3, torch_encoder.preprocessing)}
    )
    expected = torch_encoder.encode(pixels_BHW3)
    np.testing.assert_allclose(patch_tokens, expected.patch_tokens_BPC, atol=1e-4)
    np.testing.assert_allclose(embedding, expected.image_embedding_BD, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)


def test_the_file_has_no_paths_of_this_machine(exported: Path) -> None:
    model = onnx.load(exported)
    onnx.checker.check_model(model)
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(value.metadata_props for value in (*model.graph.value_info, *model.graph.initializer))
    data = exported.read_bytes()
    assert b"site-packages" not in data
    assert b".py" not in data
    assert str(Path.cwd()).encode() not in data


def test_the_same_encoder_gives_the_same_bytes(exported: Path, torch_encoder: ImageEncoder, tmp_path: Path) -> None:
    export_image_encoder(torch_encoder, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["image_encoder.onnx"]
    assert (tmp_path / "image_encoder.onnx").read_bytes() == exported.read_bytes()


def test_an_onnx_encoder_is_copied_with_its_external_data(
    exported: Path, torch_encoder: ImageEncoder, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    onnx.save_model(
        onnx.load(exported),
        source / "mine.onnx",
        save_as_external_data=True,
        location="mine.weights",
        size_threshold=1024,
    )
    (source / "mine.json").write_text(json.dumps(torch_encoder.preprocessing.to_dict()))
    encoder = open_image_encoder(f"onnx:{source / 'mine.onnx'}")
    parity = export_image_encoder(encoder, out)
    assert parity.min_cosine == 1.0
    assert sorted(file.name for file in out.iterdir()) == ["image_encoder.onnx", "mine.weights"]
    shutil.rmtree(source)
    assert measure_parity(torch_encoder, out / "image_encoder.onnx").min_cosine > 0.99999


@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_centre_is_folded_into_the_file(
    exported: Path, torch_encoder: ImageEncoder, tmp_path: Path, kind: str
) -> None:
    encoder, size_px = torch_encoder, torch_encoder.preprocessing.size_px
    if kind == "onnx":
        source = tmp_path / "mine.onnx"
        shutil.copy(exported, source)
        source.with_suffix(".json").write_text(json.dumps(torch_encoder.preprocessing.to_dict()))
        encoder = open_image_encoder(f"onnx:{source}")
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (7, size_px, size_px, 3), np.uint8)
    features = torch_encoder.encode(pixels_BHW3)
    centre_D = features.image_embedding_BD.mean(dim=0)
    out = tmp_path / "out"
    out.mkdir()
    assert export_image_encoder(encoder, out, centre_D=centre_D).min_cosine > 0.9999
    onnx.checker.check_model(onnx.load(out / "image_encoder.onnx"))
    patch_tokens, embedding = onnxruntime.InferenceSession(out / "image_encoder.onnx").run(
        ["patch_tokens", "image_embedding"], {"pixel_values": normalise(pixels_BHW3, encoder.preprocessing)}
    )
    np.testing.assert_allclose(patch_tokens, features.patch_tokens_BPC, atol=1e-4)
    shifted = (features.image_embedding_BD - centre_D).numpy()
    expected = shifted / np.linalg.norm(shifted, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding, expected, atol=1e-3)


class _Noisy(nn.Module):
    """A network with random outputs, which no file can reproduce."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3 * 64, 16)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = pixel_values.flatten(1)
        mean = self.projection(pixels + 100 * torch.randn_like(pixels))
        return mean[:, None], mean


def test_an_encoder_without_parity_is_refused(tmp_path: Path) -> None:
    preprocessing = Preprocessing(
        size_px=8, resize="squash", crop="none", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    encoder = TorchImageEncoder(_Noisy(), preprocessing, saved_config={}, spec="hf:noisy", device=torch.device("cpu"))
    with pytest.raises(EncoderSpecError, match="the ONNX file of hf:noisy differs from the original"):
        export_image_encoder(encoder, tmp_path)
