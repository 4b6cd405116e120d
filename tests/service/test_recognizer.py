"""The recogniser without HTTP, and bundles that it refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from core.errors import (
    BadParameter,
    BundleAltered,
    BundleIncomplete,
    BundleMissing,
    TooLarge,
    TooManyRequests,
    UndecodableImage,
    UserError,
)
from index.bundle import Bundle, list_files
from index.calibration import OpenSetModel, background
from service import loaded_bundle
from service.recognizer import Recognizer
from service.settings import Settings
from tests.conftest import embed
from wikiclip.answers import Recognition, RecognizeOptions


@pytest.fixture(scope="module")
def recognizer(small_bundle):
    settings = Settings(device="cpu", threads=1, max_batch=3, max_pixels=10_000)  # a GPU rounds by the batch (TF32)
    with Recognizer.open(small_bundle, settings) as recognizer:
        yield recognizer


def test_many_images_in_order_and_a_bad_one_in_its_place(recognizer, small_images):
    images = list(small_images.values())
    images.insert(4, b"no image")
    answers = recognizer.recognize_many(images, RecognizeOptions(top_k=1))
    assert isinstance(answers.pop(4), UndecodableImage)
    assert [answer.predictions[0].entity_id for answer in answers] == list(small_images)
    assert all(set(answer.timings_ms) == {"decode", "queue", "encode", "search", "total"} for answer in answers)


def test_batched_equals_one_by_one(recognizer, small_images):
    images = list(small_images.values())
    together = recognizer.recognize_many(images)
    alone = [recognizer.recognize_many([image])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert isinstance(one, Recognition)
        assert isinstance(other, Recognition)
        assert [each.entity_id for each in one.predictions] == [each.entity_id for each in other.predictions]
        assert [each.score for each in one.predictions] == pytest.approx(
            [each.score for each in other.predictions], abs=1e-5
        )


def test_images_may_wait_for_a_decoder_as_long_as_it_takes(recognizer, small_images, monkeypatch):
    monkeypatch.setattr("imaging.decoder._WAIT_SHARE", 0)  # of a deadline: nothing is begun in time
    (answer,) = recognizer.recognize_many([small_images["Q140"]])
    assert isinstance(answer, Recognition)
    with pytest.raises(TooManyRequests):
        asyncio.run(recognizer.recognize(small_images["Q140"], RecognizeOptions(explain=True)))


def test_a_box_without_width_is_refused(recognizer, small_images):
    (answer,) = recognizer.recognize_many([small_images["Q140"]], RecognizeOptions(box=(0, 0, 0, 1)))
    assert isinstance(answer, BadParameter)


def test_a_folder_whose_file_system_fails_has_disappeared(tmp_path, monkeypatch):
    manifest, closing, gone = tmp_path / "manifest.json", threading.Event(), threading.Event()
    stat = os.stat

    def stale(path, **options):
        if path == manifest:
            raise OSError(errno.ESTALE, "Stale file handle")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", stale)
    monkeypatch.setattr(loaded_bundle, "_WATCH_INTERVAL_S", 0.01)
    watch = threading.Thread(target=loaded_bundle._watch, args=(manifest, closing, gone), daemon=True)
    watch.start()
    assert gone.wait(60)
    closing.set()
    watch.join()


def test_a_filter_looks_as_far_as_it_must(recognizer, small_images):
    (answer,) = recognizer.recognize_many([small_images["Q140"]], RecognizeOptions(top_k=2, types=("monument",)))
    assert [each.entity_id for each in answer.predictions] == ["Q_no_image"]


def test_the_pixel_limit_holds(recognizer, tmp_path):
    from PIL import Image

    Image.new("RGB", (200, 200)).save(tmp_path / "large.png")
    (answer,) = recognizer.recognize_many([(tmp_path / "large.png").read_bytes()])
    assert isinstance(answer, TooLarge)


def test_without_calibration_there_is_no_confidence(small_bundle, small_images, tmp_path):
    bundle = Bundle.open(small_bundle)
    plain = replace(bundle, manifest=bundle.manifest.model_copy(update={"calibration": None}))
    with Recognizer(plain, Settings(threads=1)) as recognizer:
        (answer,) = recognizer.recognize_many([small_images["Q140"]])
    assert (answer.in_catalog_probability, answer.abstained) == (None, None)
    assert {each.confidence for each in answer.predictions} == {None}


def test_known_is_judged_by_the_embedding_too(small_bundle, small_images, tmp_path):
    folder = tmp_path / "familiar"
    shutil.copytree(small_bundle, folder)
    plain = Bundle.open(folder)
    rng = np.random.default_rng(0)
    landmarks_LD = rng.normal(size=(5, plain.manifest.embedding_dim)).astype(np.float16).astype(np.float32)
    OpenSetModel(
        offset=-1.0, best=2.0, background=-1.0, width=1.0,
        landmarks_LD=landmarks_LD, level_L=rng.normal(size=5), slope_L=rng.normal(size=5),
    ).write(folder / "familiarity.npz")  # fmt: skip
    plain.manifest.model_copy(update={"files": list_files(folder)}).write(folder / "manifest.json")
    bundle = Bundle.open(folder)
    assert bundle.fingerprint != plain.fingerprint
    session = onnxruntime.InferenceSession(bundle.image_encoder_path, providers=["CPUExecutionProvider"])
    with Recognizer(bundle, Settings(device="cpu", threads=1)) as recognizer:
        for image in list(small_images.values())[:3]:
            answers = [
                recognizer.recognize_many([image], RecognizeOptions(top_k=12, types=t))[0] for t in ((), ("monument",))
            ]
            scores = [each.score for each in answers[0].predictions]
            for answer in answers:  # a filter does not change the background
                best = [each.score for each in answer.predictions]
                known = bundle.calibration.judge(best, background(scores), embed(session, image))[1]
                assert answer.in_catalog_probability == pytest.approx(known, abs=1e-4)
                assert answer.abstained == (known < 0.5)
    (folder / "familiarity.npz").unlink()
    with pytest.raises(BundleIncomplete, match=r"familiarity\.npz"):
        Bundle.open(folder)


def test_a_missing_and_an_altered_bundle_are_refused(small_bundle, tmp_path):
    with pytest.raises(BundleMissing):
        Recognizer.open(tmp_path / "nowhere")
    altered = tmp_path / "altered"
    shutil.copytree(small_bundle, altered)
    content = bytearray((altered / "image_encoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (altered / "image_encoder.onnx").write_bytes(content)
    with pytest.raises(BundleAltered, match=r"image_encoder\.onnx"):
        Recognizer.open(altered)


def test_cuda_that_cannot_be_had_is_an_error_and_never_the_cpu(small_bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UserError, match="cuda"):
        Recognizer.open(small_bundle, Settings(device="cuda"))
    with Recognizer.open(small_bundle, Settings(device="auto")) as recognizer, recognizer.acquire() as view:
        assert view.loaded.encoder.device == "cpu"


def test_the_service_never_imports_torch():
    program = (
        "import sys, service.app, service.server, service.cli, wikiclip.client; "
        "sys.exit(sorted({'torch', 'transformers', 'onnx'} & sys.modules.keys()) or None)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
