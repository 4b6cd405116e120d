"""The length of embeddings; the encoder on CUDA if there is any, and the messages if there is not."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from core.errors import UserError
from imaging import normalise
from index.bundle import Bundle, list_files
from service.encoder import load_cuda_libraries, open_encoder
from service.settings import Settings
from tests.conftest import PREPROCESSING, SIZE_PX, random_encoder

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def test_embeddings_of_any_length_are_normalised_and_others_unchanged(small_bundle, tmp_path):
    """Confidence depends on it: an `onnx:` encoder is copied into the bundle as it is."""
    bundle = Bundle.open(small_bundle)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (3, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    expected_BD = open_encoder(bundle, PREPROCESSING, Settings(device="cpu", threads=1)).encode(pixels_BHW3)
    session = onnxruntime.InferenceSession(bundle.image_encoder_path)
    (raw_BD,) = session.run(["image_embedding"], {"pixel_values": normalise(pixels_BHW3, PREPROCESSING)})
    assert np.array_equal(raw_BD, expected_BD)
    model = random_encoder()
    model.graph.node[-1].output[0] = "unit"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(28), "length"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["unit", "length"], ["image_embedding"]))
    shutil.copytree(small_bundle, tmp_path / "long")
    (tmp_path / "long" / "image_encoder.onnx").write_bytes(model.SerializeToString(deterministic=True))
    manifest = bundle.manifest.model_copy(update={"files": list_files(tmp_path / "long")})
    manifest.write(tmp_path / "long" / "manifest.json")
    long = Bundle.open(tmp_path / "long")
    found_BD = open_encoder(long, PREPROCESSING, Settings(device="cpu", threads=1)).encode(pixels_BHW3)
    np.testing.assert_allclose(found_BD, expected_BD, atol=1e-6)


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
def test_asking_for_cuda_without_it_is_refused(small_bundle):
    with pytest.raises(UserError, match="device cuda"):
        open_encoder(Bundle.open(small_bundle), PREPROCESSING, Settings(device="cuda"))


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_libraries_of_pips_wheels_are_loaded_and_what_is_missing_is_told(small_bundle, monkeypatch, capsys):
    """As on a machine whose ONNX Runtime has CUDA and where cuDNN is missing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcudnn.so.9: no such file\nSee"))  # noqa: T201
    load_cuda_libraries.cache_clear()
    try:
        with pytest.raises(UserError, match=r"\(Failed to load libcudnn\.so\.9: no such file\); fix that"):
            open_encoder(Bundle.open(small_bundle), PREPROCESSING, Settings(device="cuda"))
        assert open_encoder(Bundle.open(small_bundle), PREPROCESSING, Settings(device="auto")).device == "cpu"
    finally:
        load_cuda_libraries.cache_clear()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not HAS_CUDA, reason="this onnxruntime has no CUDA")
def test_a_gpu_embeds_as_the_cpu_does(small_bundle):
    bundle = Bundle.open(small_bundle)
    on_gpu = open_encoder(bundle, PREPROCESSING, Settings(device="cuda", max_batch=8))
    on_cpu = open_encoder(bundle, PREPROCESSING, Settings(device="cpu", threads=1))
    assert on_gpu.device == "cuda"
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (11, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    for count in (1, 3, 8, 11):
        cosines_B = np.sum(on_gpu.encode(pixels_BHW3[:count]) * on_cpu.encode(pixels_BHW3[:count]), axis=1)
        assert cosines_B.min() > 0.999
