"""Every family of extreme images, small: each ends in time, in silence, and harms no image after it."""

from __future__ import annotations

import time
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

from benchmarks.extreme import Case, cases, encoded
from core.errors import TooLarge, UndecodableImage
from imaging import Decoder, load_pixels
from tests.conftest import PREPROCESSING

TIMEOUT_S = 2.0
BUSY_S = 30.0  # on top, on a busy machine
SHARE = 0.01
MAX_PIXELS = int(64_000_000 * SHARE)
OTHER = encoded(Image.linear_gradient("L"), "GIF")
CASES = {case.name: case for case in cases(SHARE)}


@pytest.fixture(scope="module")
def decoder():
    with closing(Decoder(max_pixels=MAX_PIXELS, budget_bytes=2**28, timeout_s=TIMEOUT_S, processes=1)) as each:
        yield each


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_extreme_image(decoder, case: Case, capfd):
    started_at = time.monotonic()
    with suppress(TooLarge, UndecodableImage):  # whatever else is raised is a fault
        assert decoder.load_pixels(case.bodies[0], PREPROCESSING).shape == (32, 32, 3)
    assert time.monotonic() - started_at < TIMEOUT_S + BUSY_S
    assert "".join(capfd.readouterr()) == ""
    expected = load_pixels(OTHER, PREPROCESSING, max_pixels=MAX_PIXELS)
    assert np.array_equal(decoder.load_pixels(OTHER, PREPROCESSING), expected)
