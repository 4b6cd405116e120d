"""Small pictures to show."""

from __future__ import annotations

import io

from imaging.decode import decode


def make_thumbnail(data: bytes, size_px: int, *, max_pixels: int) -> bytes:
    """The whole image as WebP, neither side above `size_px`. Raises `UndecodableImage`, `TooLarge`."""
    image = decode(data, max_pixels=max_pixels, target_px=size_px)
    image.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()
