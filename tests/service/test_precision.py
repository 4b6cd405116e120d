"""Which file of a bundle's encoder runs where, and that what is cached knows it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from core.errors import BundleAltered
from index.bundle import Bundle, list_files
from index.manifest import INT8_ENCODER_FILE, Int8Entry
from service.generation import encoder_hash
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
    encoder = dataclasses.replace(manifest.image_encoder, int8=int8)
    dataclasses.replace(manifest, image_encoder=encoder, files=list_files(path)).write(path / "manifest.json")
    return Bundle.open(path, verify="full")


def test_int8_on_a_cpu_and_float_where_it_is_asked_for(with_int8: Bundle, small_bundle: Path) -> None:
    pixels_1HW3 = np.full((1, 64, 64, 3), 200, np.uint8)
    found = {}
    for precision in ("auto", "float"):
        with Recognizer(with_int8, Settings(threads=1, precision=precision)) as recognizer, recognizer.hold() as held:
            generation = held.generation
            size_px = generation.preprocessing.size_px
            embedding_1D = generation.encoder.encode(pixels_1HW3[:, :size_px, :size_px])
            found[precision] = (generation.precision, generation.encoder_hash, embedding_1D)
    assert found["auto"][0] == "int8"
    assert found["float"][0] == "float"
    np.testing.assert_allclose(found["auto"][2], -found["float"][2], atol=1e-6)
    # An embedding of the float file is worth as much as one of the same bundle without int8, and no other is.
    without = encoder_hash(Bundle.open(small_bundle), "image_encoder.onnx")
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


def test_a_quantised_file_that_is_not_listed_is_refused(with_int8: Bundle) -> None:
    files = {name: entry for name, entry in with_int8.manifest.files.items() if name != INT8_ENCODER_FILE}
    dataclasses.replace(with_int8.manifest, files=files).write(with_int8.path / "manifest.json")
    with pytest.raises(BundleAltered, match="does not list image_encoder"):
        Bundle.open(with_int8.path)
