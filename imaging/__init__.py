"""From bytes to pixels: sniffing, limits, reduced-scale decoding, resize, normalise. Numpy and Pillow, no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imaging.decode import canonical_type, decode, readable_types, sniff
from imaging.preprocess import Box, Preprocessing, check_box, covered_region, normalise, target_px, to_pixels
from imaging.thumbnail import make_thumbnail

__all__ = [
    "Box",
    "Preprocessing",
    "canonical_type",
    "check_box",
    "covered_region",
    "decode",
    "load_pixels",
    "load_region",
    "make_thumbnail",
    "normalise",
    "readable_types",
    "sniff",
    "to_pixels",
]


def load_pixels(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int, box: Box | None = None
) -> npt.NDArray[np.uint8]:
    """Decode image bytes, or `box` of the image, to uint8 `[size_px, size_px, 3]`.

    Raises `BadParameter` for a box outside the image, `TooLarge`, `UndecodableImage`.
    """
    return load_region(data, preprocessing, max_pixels=max_pixels, box=box)[0]


def load_region(
    data: bytes, preprocessing: Preprocessing, *, max_pixels: int, box: Box | None = None
) -> tuple[npt.NDArray[np.uint8], Box]:
    """As `load_pixels`, with the region of the upright image that the pixels show."""
    if box is not None:
        check_box(box)
    image = decode(data, max_pixels=max_pixels, target_px=target_px(preprocessing, box))
    return to_pixels(image, preprocessing, box), covered_region(image, preprocessing, box)
