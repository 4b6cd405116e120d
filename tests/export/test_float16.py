"""The float16 encoder of a bundle: its parity is recorded, and an encoder that overflows is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.errors import EncoderSpecError, UserError
from export import onnx as onnx_step
from export import precision
from export.config import ExportConfig
from export.estimate import estimate_export
from export.onnx import Parity, export_image_encoder, measure_parity
from export.pipeline import export_bundle
from export.precision import add_float16
from imaging import Preprocessing, normalise
from index.bundle import Bundle
from index.manifest import FLOAT16_ENCODER_FILE
from index.report import describe, describe_lines
from model.encoders import ImageEncoder
from model.encoders.base import TorchImageEncoder
from service.encoder import open_encoder
from service.settings import Settings

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, torch_checkpoint: Path) -> ExportConfig:
    out = tmp_path_factory.mktemp("float16") / "things"
    config = ExportConfig(catalog=catalog.path, checkpoint=torch_checkpoint, out=out, device="cpu", float16=True)
    assert export_bundle(config).float16 is not None
    return config


def test_parity_is_in_the_manifest(config: ExportConfig) -> None:
    bundle = Bundle.open(config.out, verify="full")
    entry = bundle.manifest.image_encoder.float16
    assert entry is not None
    assert 0.9999 < entry.min_cosine <= 1
    assert 0 < entry.max_abs_diff < 0.05
    assert FLOAT16_ENCODER_FILE in bundle.manifest.files
    assert bundle.unlisted_files() == []
    report = describe(config.out, "quick")
    assert report["image_encoder"]["float16"] == entry.model_dump()
    assert any(line.startswith("float16      lowest cosine ") for line in describe_lines(report))
    plan = estimate_export(config)
    size_bytes = (config.out / FLOAT16_ENCODER_FILE).stat().st_size
    assert plan.disk_bytes["float16 encoder"] == pytest.approx(size_bytes, rel=0.5, abs=100_000)


def test_a_resume_may_add_or_drop_it(config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = dataclasses.replace(config, out=tmp_path / "things", resume=True)
    part = again.out / ".partial" / "bundle" / FLOAT16_ENCODER_FILE

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    for float16 in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr("index.manifest.Manifest.write", fail)
            with pytest.raises(RuntimeError, match="killed"):
                export_bundle(dataclasses.replace(again, float16=float16))
        assert part.exists() == float16
    without = dataclasses.replace(again, out=tmp_path / "without", float16=False)
    shutil.copytree(again.out, without.out)
    assert export_bundle(again).float16 is not None
    assert (again.out / FLOAT16_ENCODER_FILE).read_bytes() == (config.out / FLOAT16_ENCODER_FILE).read_bytes()
    assert Bundle.open(again.out, verify="full").fingerprint == Bundle.open(config.out).fingerprint
    assert export_bundle(without).float16 is None
    # The manifest of a bundle without it has no float16 field.
    manifest = json.loads((without.out / "manifest.json").read_text())
    assert "float16" not in manifest["image_encoder"]
    assert "float16" not in manifest["export"]
    for made, requested in ((again, False), (without, True)):
        with pytest.raises(UserError, match="was made with another float16"):
            export_bundle(dataclasses.replace(made, float16=requested))


def test_large_weights_are_external_data(config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered to simulate a model of gigabytes."""
    monkeypatch.setattr(onnx_step, "EXTERNAL_FROM_BYTES", 1000)
    large = dataclasses.replace(config, out=tmp_path / "large")
    export_bundle(large)
    bundle = Bundle.open(large.out, verify="full")
    data = f"{FLOAT16_ENCODER_FILE}.data"
    assert data in bundle.manifest.files
    assert bundle.manifest.files[data].bytes < 0.7 * bundle.manifest.files["image_encoder.onnx.data"].bytes
    large.out.rename(tmp_path / "moved")
    pixels = {"pixel_values": np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)}
    found, expected = (
        onnxruntime.InferenceSession(folder / FLOAT16_ENCODER_FILE).run(["image_embedding"], pixels)[0]
        for folder in (tmp_path / "moved", config.out)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_centre_is_folded_in(torch_encoder: ImageEncoder, tmp_path: Path) -> None:
    size_px = torch_encoder.preprocessing.size_px
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (7, size_px, size_px, 3), np.uint8)
    embedding_BD = torch_encoder.encode(pixels_BHW3).image_embedding_BD
    centre_D = 0.5 * embedding_BD.mean(dim=0)
    entry = add_float16(torch_encoder, tmp_path, centre_D)
    assert entry.min_cosine > 0.999
    (found_BD,) = onnxruntime.InferenceSession(tmp_path / FLOAT16_ENCODER_FILE).run(
        ["image_embedding"], {"pixel_values": normalise(pixels_BHW3, torch_encoder.preprocessing)}
    )
    np.testing.assert_allclose(found_BD, F.normalize(embedding_BD - centre_D, dim=1), atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(found_BD, axis=1), 1, atol=1e-5)  # normalised in float32
    assert onnx.load(tmp_path / FLOAT16_ENCODER_FILE).graph.node[-1].op_type == "LpNormalization"


class _Large(nn.Module):
    """A network with small inputs and outputs whose intermediate value overflows in float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(3 * 64, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.up.weight.mul_(30_000)
            self.down.weight.mul_(1 / 30_000)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.down(4 * self.up(pixel_values.flatten(1)))
        return mean[:, None], mean


def test_overflow_is_refused_although_a_cpu_runs_the_file(tmp_path: Path) -> None:
    grey = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(
        size_px=8, resize="squash", crop="none", interpolation="bilinear", mean=grey, std=grey
    )
    encoder = TorchImageEncoder(_Large(), preprocessing, saved_config={}, spec="hf:large", device=torch.device("cpu"))
    assert export_image_encoder(encoder, tmp_path).min_cosine > 0.9999
    with pytest.raises(EncoderSpecError, match=r"loses too much in float16: minimum cosine nan .* without --float16"):
        add_float16(encoder, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["image_encoder.onnx"]


def test_nan_is_the_worst_parity(image_encoder: ImageEncoder, tmp_path: Path) -> None:
    assert not Parity(max_abs_diff=float("inf"), min_cosine=1.0).holds(0.999)
    assert not Parity(max_abs_diff=0.0, min_cosine=float("nan")).holds(-1.0)
    export_image_encoder(image_encoder, tmp_path)
    model = onnx.load(path := tmp_path / "image_encoder.onnx")
    for node in model.graph.node:
        node.output[:] = ["finite" if name == "image_embedding" else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32("nan"), "nan"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["finite", "nan"], ["image_embedding"]))
    onnx.save(model, path)
    parity = measure_parity(image_encoder, path)
    assert np.isnan(parity.min_cosine)
    assert not parity.holds(0.0)


def test_an_inaccurate_encoder_is_refused_before_the_shards(
    config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = dataclasses.replace(config, out=tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(precision, "MIN_COSINE", 1.1)
        with pytest.raises(EncoderSpecError, match="continue with --resume, without --float16"):
            export_bundle(change)
    assert not list((change.out / ".partial" / "shards").iterdir())
    assert export_bundle(dataclasses.replace(change, float16=False, resume=True)).float16 is None


def test_an_onnx_encoder_is_refused(image_encoder: ImageEncoder, tmp_path: Path) -> None:
    with pytest.raises(EncoderSpecError, match=r"--float16 needs an image encoder in torch.* convert the file by hand"):
        add_float16(image_encoder, tmp_path)


@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no CUDA")
def test_embeddings_on_a_gpu_are_close_to_those_of_float32(config: ExportConfig) -> None:
    bundle = Bundle.open(config.out)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    on_gpu = open_encoder(bundle, preprocessing, Settings(device="cuda", max_batch=8))
    on_cpu = open_encoder(bundle, preprocessing, Settings(device="cpu", threads=1, precision="float"))
    assert (on_gpu.device, on_gpu.file) == ("cuda", FLOAT16_ENCODER_FILE)
    size_px = preprocessing.size_px
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (11, size_px, size_px, 3), dtype=np.uint8)
    assert np.sum(on_gpu.encode(pixels_BHW3) * on_cpu.encode(pixels_BHW3), axis=1).min() > 0.999
