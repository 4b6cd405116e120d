"""Resize, crop and normalise, compared with slow reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from core.errors import BadParameter, EncoderSpecError
from imaging import Preprocessing, normalise, to_pixels

CLIP = {
    "size_px": 64,
    "resize": "shortest",
    "crop": "center",
    "interpolation": "bicubic",
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
}


def gradient(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1), (rows + columns) * 7 % 256)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def resize_then_crop(image: Image.Image, size_px: int) -> np.ndarray:
    """Scale the shorter side, then crop the centre, as reference preprocessors do."""
    scale = min(image.size)
    width, height = (int(size_px * side / scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size_px) // 2, (height - size_px) // 2
    return np.asarray(resized.crop((left, top, left + size_px, top + size_px)))


def test_the_json_form_survives_a_round_trip():
    assert Preprocessing.from_dict(CLIP).to_dict() == CLIP


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size_px": 0}, "size_px"),
        ({"size_px": "96"}, "size_px"),
        ({"resize": "stretch"}, "resize"),
        ({"crop": "none"}, "different shapes"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_field_is_named(change, named):
    with pytest.raises(EncoderSpecError, match=named):
        Preprocessing.from_dict({**CLIP, **change})


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (333, 517), (64, 64), (40, 30)])
def test_shortest_and_centre_equal_resize_then_crop(size):
    image = gradient(*size)
    pixels = to_pixels(image, Preprocessing.from_dict(CLIP))
    assert pixels.shape == (64, 64, 3)
    difference = np.abs(pixels.astype(int) - resize_then_crop(image, 64))
    assert difference.mean() < 0.3  # half a pixel off would be above 1
    assert difference.max() <= 4


def test_a_very_long_strip_stays_cheap():
    strip = Image.new("RGB", (60_000, 1), (10, 200, 30))
    assert (to_pixels(strip, Preprocessing.from_dict(CLIP)) == (10, 200, 30)).all()


def test_squash_keeps_the_whole_image():
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (0, 0, 20, 100))
    squashed = to_pixels(image, Preprocessing.from_dict({**CLIP, "resize": "squash", "crop": "none"}))
    assert (squashed[:, :5] > 250).all()
    assert (squashed[:, 8:] < 10).all()


def test_a_box_selects_its_region():
    image = Image.new("RGB", (100, 100), "black")
    image.paste("red", (50, 0, 100, 50))
    inside = to_pixels(image, Preprocessing.from_dict(CLIP), (0.55, 0.05, 0.4, 0.4))
    assert (inside == (255, 0, 0)).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 1), (-0.1, 0, 1, 1), (0.5, 0.5, 0.6, 0.1), (0, 0, float("nan"), 1), (float("inf"), 0, 1, 1)]
)
def test_a_box_outside_the_image_is_refused(box):
    with pytest.raises(BadParameter, match="fractions"):
        to_pixels(gradient(20, 20), Preprocessing.from_dict(CLIP), box)


def test_normalise_equals_the_formula():
    preprocessing = Preprocessing.from_dict(CLIP)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    expected = (pixels / 255 - preprocessing.mean) / np.array(preprocessing.std)
    normalised = normalise(pixels, preprocessing)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, expected.transpose(0, 3, 1, 2), atol=1e-6)
