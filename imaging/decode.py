"""Decode untrusted bytes to an upright RGB image within a size limit, and make thumbnails."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import AvifImagePlugin, Image, ImageOps, JpegImagePlugin, features

from core.errors import TooLarge, UndecodableImage

try:
    import pillow_heif
except ImportError:  # optional: extra `heic`
    pillow_heif = None

_PILLOW_FORMATS = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "image/avif": "AVIF",
    "image/heic": "HEIF",
}
_ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/x-ms-bmp": "image/bmp",
    "image/tif": "image/tiff",
    "image/heif": "image/heic",
}
_MAGIC = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
)
_FTYP_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "image/avif"),
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"), "image/heic"),
}
_MAX_FTYP_BYTES = 256


@cache
def readable_types() -> tuple[str, ...]:
    """Configure Pillow and return the media types that can be decoded with the installed libraries."""
    # Pillow's own limit is the same for the whole process. `decode` checks each caller's limit against the header.
    Image.MAX_IMAGE_PIXELS = None
    # Callers decode many images in parallel, so one image uses one thread.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if pillow_heif is not None:
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    missing = {"image/avif": not features.check("avif"), "image/heic": pillow_heif is None}
    return tuple(kind for kind in _PILLOW_FORMATS if not missing.get(kind, False))


def canonical_type(media_type: str) -> str | None:
    """Return the readable type for a declared `Content-Type` (aliases resolved, parameters ignored), else None."""
    kind = media_type.partition(";")[0].strip().lower()
    kind = _ALIASES.get(kind, kind)
    return kind if kind in readable_types() else None


def sniff(data: bytes) -> str | None:
    """Return the media type of the bytes by their magic numbers, else None. Not every such type can be decoded."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    if data[4:8] == b"ftyp":
        # The major brand may name only the container (mif1). The compatible brands, from byte 16, name the codec.
        end = min(int.from_bytes(data[:4], "big"), _MAX_FTYP_BYTES)
        brands = [data[8:12], *(data[at : at + 4] for at in range(16, end, 4))]
        return next((_FTYP_BRANDS[brand] for brand in brands if brand in _FTYP_BRANDS), None)
    return None


def decode(data: bytes, *, max_pixels: int, target_px: int | None = None) -> Image.Image:
    """Decode to RGB: upright by EXIF, transparent pixels white, the first frame of an animation.

    With `target_px`, a large JPEG is decoded at a reduced scale, with both sides still at least `2 * target_px`.
    Raises `TooLarge` if the header declares more than `max_pixels` pixels, `UndecodableImage` if decoding fails.
    """
    kind = sniff(data)
    if kind is None:
        raise UndecodableImage("the bytes are not an image; send one of " + ", ".join(readable_types()))
    if kind not in readable_types():
        raise UndecodableImage(f"{kind} is not supported here; send one of " + ", ".join(readable_types()))
    try:
        with Image.open(io.BytesIO(data), formats=(_PILLOW_FORMATS[kind],)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooLarge(f"the image has {width} x {height} pixels; the limit is {max_pixels}, scale it down")
            if target_px is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                image.draft(None, (2 * target_px, 2 * target_px))
            image.load()
            with suppress(Exception):  # a picture that decodes is accepted even if its metadata does not parse
                ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except TooLarge:
        raise
    except Exception as error:
        # Damaged files make Pillow raise many types: OSError, SyntaxError, struct.error, zlib.error, IndexError ...
        raise UndecodableImage(f"the {kind} data is truncated or damaged; send a whole image file") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(background, layer).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Convert 16- or 32-bit grey to RGB. Pillow's own conversion clips at 255, which gives a white image."""
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    if image.mode.startswith("I;16"):
        scale = 255 / 65535
    else:
        # 32-bit files do not declare their range. Use the smallest common range that fits the values.
        peak = float(values.max(initial=0))
        white = next((limit for limit in (1.0, 255.0, 65535.0) if peak <= limit), peak)
        scale = 255 / white
    return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8)).convert("RGB")


def make_thumbnail(data: bytes, size_px: int, *, max_pixels: int) -> bytes:
    """Return the image as WebP with no side above `size_px`. Raises `UndecodableImage`, `TooLarge`."""
    image = decode(data, max_pixels=max_pixels, target_px=size_px)
    image.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()
