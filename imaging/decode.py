"""Decode untrusted bytes to an upright RGB image within a size limit, and make thumbnails."""

import io
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from PIL import AvifImagePlugin, Image, JpegImagePlugin, features

from core.arrays import Float32Array
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
MAX_PIXELS = 64_000_000  # of an image by default, as in the service
_MAX_FTYP_BYTES = 256
_STRIP_PIXELS = 2**18  # converted at a time, so that no conversion holds a third copy of the image

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def readable_types() -> tuple[str, ...]:
    """Configure Pillow and return the media types that can be decoded with the installed libraries."""
    # Pillow's own limit is the same for the whole process. `decode` checks each caller's limit against the header.
    Image.MAX_IMAGE_PIXELS = None
    # Damaged metadata makes Pillow warn, in words from the file: that would let anyone write to the log.
    warnings.filterwarnings("ignore", module=r"PIL\.")
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


def readable_type(data: bytes) -> str:
    """Return the media type of the bytes. Raises `UndecodableImage` unless it can be decoded here."""
    kind = sniff(data)
    if kind is None:
        raise UndecodableImage("the bytes are not an image; send one of " + ", ".join(readable_types()))
    if kind not in readable_types():
        raise UndecodableImage(f"{kind} is not supported here; send one of " + ", ".join(readable_types()))
    return kind


def check_size(width: int, height: int, max_pixels: int, what: str = "the image") -> None:
    """Raise `TooLarge` if there are more than `max_pixels` pixels."""
    if width * height > max_pixels:
        raise TooLarge(f"{what} has {width} x {height} pixels; the limit is {max_pixels}, scale it down")


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, target_px: int | None = None) -> Image.Image:
    """Decode to RGB: upright by EXIF, transparent pixels white, the first frame of an animation.

    With `target_px`, a large JPEG is decoded at a reduced scale, with both sides still at least `2 * target_px`.
    Raises `TooLarge` if the header declares more than `max_pixels` pixels, `UndecodableImage` if decoding fails. Time
    and memory are not limited: `Decoder` does that.
    """
    kind = readable_type(data)
    try:
        with Image.open(io.BytesIO(data), formats=(_PILLOW_FORMATS[kind],)) as image:
            check_size(*image.size, max_pixels)
            if target_px is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                image.draft(None, (2 * target_px, 2 * target_px))
            image.load()
            orientation = _orientation(image)
            rgb = _to_rgb(image)
    except (TooLarge, MemoryError):
        raise
    except Exception as error:
        # Damaged files make Pillow raise many types: OSError, SyntaxError, struct.error, zlib.error, IndexError ...
        raise UndecodableImage(f"the {kind} data is truncated or damaged; send a whole image file") from error
    if orientation not in _UPRIGHT:
        return rgb
    del image  # otherwise there would be three copies of the pixels
    return rgb.transpose(_UPRIGHT[orientation])


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation. (`ImageOps.exif_transpose` also rewrites the EXIF block, which may take long.)"""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except MemoryError:
        raise
    except Exception:  # a picture that decodes is accepted even if its metadata does not parse
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep_grey(image)
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return _in_strips(image, lambda strip: strip.convert("RGB"))


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the top row and the pixels of each strip of the image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return the RGB image that `convert` makes of the image, strip by strip."""
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Convert 16- or 32-bit grey to RGB. Pillow's own conversion clips at 255, which gives a white image."""
    scale = 255 / 65535
    if not image.mode.startswith("I;16"):
        # 32-bit files do not declare their range. Use the smallest common range that fits the values.
        peak = max(float(_values(strip).max(initial=0)) for _, strip in _strips(image))
        scale = 255 / next((limit for limit in (1.0, 255.0, 65535.0) if peak <= limit), peak)

    def convert(strip: Image.Image) -> Image.Image:
        return Image.fromarray(np.clip(_values(strip) * scale, 0, 255).round().astype(np.uint8)).convert("RGB")

    return _in_strips(image, convert)


def _values(grey: Image.Image) -> Float32Array:
    values: Float32Array = np.nan_to_num(np.asarray(grey).astype(np.float32))
    return values


def make_thumbnail(data: bytes, size_px: int, *, max_pixels: int) -> bytes:
    """Return the image as WebP with no side above `size_px`. Raises `UndecodableImage`, `TooLarge`."""
    image = decode(data, max_pixels=max_pixels, target_px=size_px)
    image.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4)
    return buffer.getvalue()
