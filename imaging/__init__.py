"""From bytes to pixels: sniffing, limits, reduced-scale decoding, resize, normalise. Numpy and Pillow, no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imaging.decode import canonical_type, decode, readable_types, sniff
from imaging.preprocess import Box, Preprocessing, check_box, normalise, target_px, to_pixels

__all__ = [
    "Box",
    "Preprocessing",
    "canonical_type",
    "check_box",
    "decode",
    "load_pixels",
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
    if box is not None:
        check_box(box)
    image = decode(data, max_pixels=max_pixels, target_px=target_px(preprocessing, box))
    return to_pixels(image, preprocessing, box)
