"""The encoder's batches: bucket sizes, padding, and the same embeddings as without. On CUDA only where it is there."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from core.errors import UserError
from index.bundle import Bundle
from service.buckets import BucketedRuns, bucket_of, bucket_sizes
from service.encoder import load_cuda_libraries
from service.generation import open_encoder
from service.settings import Settings
from tests.conftest import PREPROCESSING, SIZE_PX

HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.mark.parametrize(
    ("max_batch", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (32, (1, 2, 4, 8, 16, 32)), (48, (1, 2, 4, 8, 16, 32, 48))],
)
def test_bucket_sizes(max_batch, sizes):
    assert bucket_sizes(max_batch) == sizes


def test_the_bucket_is_the_smallest_that_holds_the_batch():
    sizes = bucket_sizes(48)
    for count in range(1, 49):
        size = bucket_of(count, sizes)
        assert size >= count
        assert not [smaller for smaller in sizes if count <= smaller < size]
    assert bucket_of(49, sizes) == 48


@pytest.fixture
def session(small_bundle):
    path = Bundle.open(small_bundle).image_encoder_path
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_padded_batches_give_what_unpadded_ones_give(session):
    shape = (3, SIZE_PX, SIZE_PX)
    runs = BucketedRuns(session, "pixel_values", shape, max_batch=6, device="cpu")
    runs.warm_up("image_embedding")
    rng = np.random.default_rng(0)
    for count in (5, 1, 6, 3, 15, 1):  # a smaller batch after a larger one must not see what is left of it
        pixels_B3HW = rng.normal(size=(count, *shape)).astype(np.float32)
        for name in ("image_embedding", "patch_tokens"):
            (expected,) = session.run([name], {"pixel_values": pixels_B3HW})
            found = runs.run(name, pixels_B3HW)
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-5


def test_an_answer_is_not_overwritten_by_the_next_run(session):
    runs = BucketedRuns(session, "pixel_values", (3, SIZE_PX, SIZE_PX), max_batch=2, device="cpu")
    rng = np.random.default_rng(0)
    first = runs.run("image_embedding", rng.normal(size=(1, 3, SIZE_PX, SIZE_PX)).astype(np.float32))
    kept = first.copy()
    runs.run("image_embedding", rng.normal(size=(1, 3, SIZE_PX, SIZE_PX)).astype(np.float32))
    assert np.array_equal(first, kept)


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
