"""Which file of a bundle's encoder runs where, and that what is cached knows it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from core.errors import BundleAltered
from index.bundle import Bundle, list_files
from index.manifest import FLOAT16_ENCODER_FILE, INT8_ENCODER_FILE, Float16Entry, Int8Entry
from service import encoder
from service.encoder import open_encoder
from service.recognizer import Recognizer
from service.settings import Settings


@pytest.fixture
def with_int8(small_bundle: Path, tmp_path: Path) -> Bundle:
    """The small bundle with a second encoder file, of the opposite embeddings: no answer is the same."""
    path = tmp_path / "small"
    shutil.copytree(small_bundle, path)
    model = onnx.load(path / "image_encoder.onnx")
    for node in model.graph.node:
        node.output[:] = ["float" if name == "image_embedding" else name for name in node.output]
    model.graph.node.append(onnx.helper.make_node("Neg", ["float"], ["image_embedding"]))
    onnx.save(model, path / INT8_ENCODER_FILE)
    manifest = Bundle.open(small_bundle).manifest
    int8 = Int8Entry(
        file=INT8_ENCODER_FILE, calibrated_on=1, judged_on="catalog images", images=1, min_cosine=-1.0,
        mean_cosine=-1.0, same_top_1=0.0, top_1_float=100.0, top_1_int8=0.0,
    )  # fmt: skip
    encoder = manifest.image_encoder.model_copy(update={"int8": int8})
    manifest.model_copy(update={"image_encoder": encoder, "files": list_files(path)}).write(path / "manifest.json")
    return Bundle.open(path, verify="full")


def test_int8_on_a_cpu_and_float_where_it_is_asked_for(with_int8: Bundle, small_bundle: Path) -> None:
    pixels_1HW3 = np.full((1, 64, 64, 3), 200, np.uint8)
    found = {}
    for precision in ("auto", "float"):
        with (
            Recognizer(with_int8, Settings(threads=1, precision=precision)) as recognizer,
            recognizer.acquire() as held,
        ):
            generation = held.loaded
            size_px = generation.preprocessing.size_px
            embedding_1D = generation.encoder.encode(pixels_1HW3[:, :size_px, :size_px])
            found[precision] = (generation.precision, generation.encoder_hash, embedding_1D)
    assert found["auto"][0] == "int8"
    assert found["float"][0] == "float"
    np.testing.assert_allclose(found["auto"][2], -found["float"][2], atol=1e-6)
    # An embedding of the float file is worth as much as one of the same bundle without int8, and no other is.
    without = Bundle.open(small_bundle).manifest.encoder_hash("image_encoder.onnx")
    assert found["float"][1] == without != found["auto"][1]


def test_answers_in_a_shared_cache_are_told_apart(serve, with_int8, small_images, redis_server) -> None:
    _, url = redis_server()
    shared = {"redis_url": url, "redis_timeout_ms": 5000}
    with (
        serve(with_int8.path, **shared) as quantised,
        serve(with_int8.path, **shared, precision="float") as exact,
    ):
        answers = []
        for service in (quantised, exact, exact):
            image = {"content": small_images["Q15083"], "headers": {"Content-Type": "image/png"}}
            answers.append(service.post("/recognize", **image).json())
        assert [service.get("/info").json()["precision"] for service in (quantised, exact)] == ["int8", "float"]
    assert [answer["cached"] for answer in answers] == [False, False, True]
    assert [answer["predictions"][0]["entity_id"] == "Q15083" for answer in answers] == [False, True, True]


@pytest.fixture
def with_both(with_int8: Bundle) -> Bundle:
    """The bundle with int8 and with a third file, a copy of the float one."""
    shutil.copy(with_int8.image_encoder_path, with_int8.path / FLOAT16_ENCODER_FILE)
    manifest = with_int8.manifest
    float16 = Float16Entry(file=FLOAT16_ENCODER_FILE, max_abs_diff=0.0, min_cosine=1.0)
    encoder = manifest.image_encoder.model_copy(update={"float16": float16})
    files = list_files(with_int8.path)
    manifest.model_copy(update={"image_encoder": encoder, "files": files}).write(with_int8.path / "manifest.json")
    return Bundle.open(with_int8.path, verify="full")


@pytest.mark.parametrize(
    ("device", "precision", "file"),
    [
        ("cuda", "auto", FLOAT16_ENCODER_FILE),
        ("cuda", "float", "image_encoder.onnx"),
        ("cpu", "auto", INT8_ENCODER_FILE),
        ("cpu", "float", "image_encoder.onnx"),
    ],
)
def test_each_device_has_its_own_file(
    with_both: Bundle, small_bundle: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, file: str
) -> None:
    """On a GPU float16, where it is asked for and got: here by an encoder that says so."""

    class OnDevice(encoder.OnnxEncoder):
        def __init__(self, path: Path, *given: Any, **settings: Any) -> None:
            super().__init__(path, *given, **{**settings, "device": "cpu"})
            self.device = device

    monkeypatch.setattr(encoder, "expected_device", lambda requested: device if requested == "auto" else requested)
    monkeypatch.setattr(encoder, "OnnxEncoder", OnDevice)
    settings = Settings(threads=1, precision=precision, search_device="cpu")
    with Recognizer(with_both, settings) as recognizer, recognizer.acquire() as held:
        assert held.loaded.encoder.file == file
        assert file == with_both.manifest.image_encoder.files[held.loaded.precision]
        plain = open_encoder(Bundle.open(small_bundle), held.loaded.preprocessing, settings)
    assert plain.file == "image_encoder.onnx"


def test_where_cuda_was_wanted_and_not_got_the_file_is_a_cpus(
    with_both: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Noted(encoder.OnnxEncoder):
        def __init__(self, path: Path, *given: Any, **settings: Any) -> None:
            opened.append(path.name)
            super().__init__(path, *given, **{**settings, "device": "cpu"})

    monkeypatch.setattr(encoder, "expected_device", lambda requested: "cuda" if requested == "auto" else requested)
    monkeypatch.setattr(encoder, "OnnxEncoder", Noted)
    with Recognizer(with_both, Settings(threads=1)) as recognizer, recognizer.acquire() as held:
        assert held.loaded.precision == "int8"
    assert opened == [FLOAT16_ENCODER_FILE, INT8_ENCODER_FILE]


def test_each_file_has_its_own_place_in_the_cache(with_both: Bundle, with_int8: Bundle, small_bundle: Path) -> None:
    files = with_both.manifest.image_encoder.files
    assert set(files) == {"float", "int8", "float16"}
    hashes = {precision: with_both.manifest.encoder_hash(file) for precision, file in files.items()}
    assert len(set(hashes.values())) == 3
    # Other files in the bundle do not change a file's hash.
    assert hashes["float"] == Bundle.open(small_bundle).manifest.encoder_hash("image_encoder.onnx")
    assert hashes["int8"] == with_int8.manifest.encoder_hash(INT8_ENCODER_FILE)


def test_a_file_in_float16_that_is_not_listed_is_refused(with_both: Bundle) -> None:
    files = {name: entry for name, entry in with_both.manifest.files.items() if name != FLOAT16_ENCODER_FILE}
    with_both.manifest.model_copy(update={"files": files}).write(with_both.path / "manifest.json")
    with pytest.raises(BundleAltered, match=r"does not list image_encoder\.float16\.onnx"):
        Bundle.open(with_both.path)


def test_a_quantised_file_that_is_not_listed_is_refused(with_int8: Bundle) -> None:
    files = {name: entry for name, entry in with_int8.manifest.files.items() if name != INT8_ENCODER_FILE}
    with_int8.manifest.model_copy(update={"files": files}).write(with_int8.path / "manifest.json")
    with pytest.raises(BundleAltered, match="does not list image_encoder"):
        Bundle.open(with_int8.path)
