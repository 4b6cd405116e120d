"""Changed copies of an image, as queries for an entity that has no other image.

Shapes: H = W = size_px.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from export.decode import Pixels

_MIN_SIDE = 0.6  # of a crop, as a share of the image
_COLOUR = 0.3  # brightness, contrast and saturation change by up to this share
_MAX_BLUR = 1 / 100  # radius, as a share of the image


def changed_view(pixels_HW3: Pixels, seed: tuple[int, int]) -> Pixels:
    """Return a crop with other colours, blurred, and mirrored half of the time. Equal seeds give equal views."""
    rng = np.random.default_rng(seed)
    size_px = len(pixels_HW3)
    side = rng.uniform(_MIN_SIDE, 1) * size_px
    left, top = rng.uniform(0, size_px - side, 2)
    image = Image.fromarray(pixels_HW3)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - _COLOUR, 1 + _COLOUR))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, _MAX_BLUR) * size_px)))
