"""Decoding in worker processes: results are in order, and an image that crashes its worker is rejected alone."""

from __future__ import annotations

import importlib
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.extreme import encoded, tiff_fax
from catalog.images import ImageReader, UnusableImage
from core.errors import CatalogError
from export.decode import DecodePool, ImageJob, hash_text
from imaging import Preprocessing, load_pixels

PREPROCESSING = Preprocessing(
    size_px=16, resize="squash", crop="none", interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
# Workers import it by name, so it is written as a module.
READER = """
import os, signal
from catalog.images import ImageReader
from core.errors import CatalogError

class Reader:
    def read(self, image):
        if "poison" in image:
            os.kill(os.getpid(), signal.SIGKILL)
        if "unplugged" in image:
            raise CatalogError("the disk is gone")
        return ImageReader().read(image)
"""


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(40):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        path = tmp_path / f"{number}.png"
        path.write_bytes(buffer.getvalue())
        paths.append(str(path))
    return paths


def gif_with_a_large_frame() -> bytes:
    data = bytearray(encoded(Image.new("P", (5000, 5000)), "GIF"))
    data[6:10] = b"\x40\0\x40\0"  # the canvas, which Pillow enlarges to its first frame
    return bytes(data)


def job(*images: str, text: str = "", known_hash: bytes = b"", known_images: int = 0) -> ImageJob:
    return ImageJob(images=images, text_hash=hash_text(text), known_hash=known_hash, known_images=known_images)


def pool(reader: object) -> DecodePool:
    return DecodePool(reader, PREPROCESSING, thumbnail_px=0, workers=2)  # type: ignore[arg-type]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    name = "reader_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name).Reader()


def test_only_the_image_that_crashes_its_worker_is_rejected(images: list[str], reader: object) -> None:
    jobs = [job(image) for image in images]
    jobs[3], jobs[30] = job("poison 1"), job("poison 2")
    with pool(reader) as workers:
        decoded = list(workers.map(jobs))
    for number, (image, found) in enumerate(zip(images, decoded, strict=True)):
        if number in (3, 30):
            assert (found.pixels, found.content_hash) == ([], b"")
            assert "the decoding process crashed" in found.failures[0][1]
        else:
            expected_HW3 = load_pixels(Path(image).read_bytes(), PREPROCESSING, max_pixels=1000)
            np.testing.assert_array_equal(found.pixels[0], expected_HW3)
            assert not found.failures


def test_an_extreme_image_is_rejected_alone(images: list[str], tmp_path: Path) -> None:
    extreme = {"fax": tiff_fax(10**6), "frame": gif_with_a_large_frame()}
    for name, data in extreme.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in extreme]
    with pool(ImageReader()) as workers:
        (found,) = workers.map([job(images[0], *paths, images[1])])
    assert len(found.pixels) == 2
    assert [image for image, _ in found.failures] == paths
    assert "fax coding" in found.failures[0][1]
    assert "the header suggests" in found.failures[1][1]


def test_a_failing_disk_ends_the_export(images: list[str], reader: object) -> None:
    with pool(reader) as workers, pytest.raises(CatalogError, match="the disk is gone"):
        list(workers.map([job(images[0]), job("unplugged"), job(images[1])]))


def test_content_hashes_depend_on_text_and_image_bytes_in_order(images: list[str]) -> None:
    one, other = images[:2]
    jobs = [job(one, other), job(one, other), job(other, one), job(one), job(one, other, text="x"), job()]
    with pool(ImageReader()) as workers:
        hashes = [decoded.content_hash for decoded in workers.map(jobs)]
        again = [job(one, other, known_hash=hashes[0], known_images=2), job(one, known_hash=hashes[0], known_images=2)]
        unchanged = [decoded.unchanged for decoded in workers.map(again)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 5
    assert unchanged == [True, False]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path), "nowhere.png", "nul\0.png", "https://x.org/a.png"):
        with pytest.raises(UnusableImage):
            ImageReader().read(name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
