"""Changed copies of an image, as queries for an entity that has no other image: in training, and when exporting.

Shapes: H = W = size_px.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from core.arrays import Pixels

_COLOUR = 0.5  # brightness, contrast and saturation change by up to this share
_MAX_BLUR = 0.02  # radius, as a share of the image


def changed_view(pixels_HW3: Pixels, seed: tuple[int, int], sides: tuple[float, float]) -> Pixels:
    """Return a square crop with other colours, blurred, and mirrored half of the time. Equal seeds give equal views.

    `sides` are the least and the greatest side of the crop, as shares of the image's.
    """
    rng = np.random.default_rng(seed)
    size_px = len(pixels_HW3)
    side = rng.uniform(*sides) * size_px
    left, top = rng.uniform(0, size_px - side, 2)
    image = Image.fromarray(pixels_HW3)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - _COLOUR, 1 + _COLOUR))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, _MAX_BLUR) * size_px)))
