"""Photographs of one drawing, for `python -m demo.views`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from demo.views import error_interval, photographs


def test_photographs_of_a_drawing_are_independent_and_repeatable(tmp_path):
    for number, colour in enumerate(("red", "blue")):
        drawing = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(drawing).ellipse((20, 20, 108, 108), fill=colour)
        drawing.save(tmp_path / f"{number}.png")
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    first, again = (list(photographs(paths, 3)) for _ in range(2))
    assert first == again
    assert [len(set(photos)) for photos in first] == [3, 3]
    for photos, channel in zip(first, (0, 2), strict=True):
        pixels = [np.asarray(Image.open(io.BytesIO(photo)).convert("RGB")).astype(float) for photo in photos]
        assert all((each[..., channel] > each[..., 2 - channel] + 30).mean() > 0.05 for each in pixels)


def test_the_interval_of_an_error_has_the_error_and_narrows():
    rng = np.random.default_rng(0)
    confidences = rng.random(4000)
    right = (rng.random(4000) < 0.8 * confidences).tolist()
    low, high = error_interval(confidences.tolist(), right)
    assert low < 0.1 == pytest.approx(high, abs=0.03)
    few_low, few_high = error_interval(confidences[:200].tolist(), right[:200])
    assert few_high - few_low > high - low
