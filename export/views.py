"""Changed copies of an image, as queries for an entity that has no other image.

Shapes: H = W = size_px.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from core.arrays import Pixels

# Milder views are far easier than other photographs: the service would abstain from most of these (docs/LOG.md).
_MIN_SIDE, _MAX_SIDE = 0.25, 0.5  # of a crop, as a share of the image
_COLOUR = 0.5  # brightness, contrast and saturation change by up to this share
_MAX_BLUR = 0.02  # radius, as a share of the image


def changed_view(pixels_HW3: Pixels, seed: tuple[int, int]) -> Pixels:
    """Return a close-up with other colours, blurred, and mirrored half of the time. Equal seeds give equal views."""
    rng = np.random.default_rng(seed)
    size_px = len(pixels_HW3)
    side = rng.uniform(_MIN_SIDE, _MAX_SIDE) * size_px
    left, top = rng.uniform(0, size_px - side, 2)
    image = Image.fromarray(pixels_HW3)
    image = image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - _COLOUR, 1 + _COLOUR))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, _MAX_BLUR) * size_px)))
