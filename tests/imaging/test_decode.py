"""Decoding of every supported type, and refusal of damaged or oversized files."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from benchmarks.extreme import chunk, encoded
from core.errors import TooLarge, UndecodableImage
from imaging import canonical_type, decode, load_pixels, readable_types, sniff
from tests.conftest import PREPROCESSING

MAX_PIXELS = 1_000_000


def giant_png(width: int, height: int) -> bytes:
    """A black one-bit PNG of any size in a few kilobytes."""
    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_each_type_is_sniffed_and_decodes(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encoded(Image.new("RGB", (40, 30), (250, 10, 20)), kind)
    assert sniff(data) == f"image/{kind.lower()}"
    image = decode(data, max_pixels=MAX_PIXELS)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image).astype(int) - (250, 10, 20)).max() < 12


def test_declared_types():
    assert canonical_type("image/JPG; q=1") == "image/jpeg"
    assert canonical_type("image/png") == "image/png"
    assert canonical_type("image/svg+xml") is None
    assert canonical_type("text/plain") is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_honoured(kind, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("black", (0, 0, 16, 16))  # the top left corner is dark
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # inverse transpositions
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, kind, exif=exif), max_pixels=MAX_PIXELS)
    assert image.size == (48, 32)
    assert max(image.getpixel((4, 4))) < 40
    assert min(min(image.getpixel(corner)) for corner in [(44, 4), (4, 28), (44, 28)]) > 215


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    decoded = decode(encoded(image, "PNG"), max_pixels=MAX_PIXELS)
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((5, 5)) == (255, 255, 255)


def test_a_palette_with_transparency():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=0), max_pixels=MAX_PIXELS)
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((5, 5)) == (0, 0, 255)


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode(encoded(image, "JPEG"), max_pixels=MAX_PIXELS).getpixel((8, 8))
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_shades(kind):
    values = np.linspace(0, 65535, 64, dtype=np.uint16)[None, :].repeat(8, axis=0)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), kind), max_pixels=MAX_PIXELS))
    assert np.abs(decoded[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data, max_pixels=MAX_PIXELS).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for length in (len(data) // 2, 20, 13):
        with pytest.raises(UndecodableImage):
            decode(data[:length], max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("data", [b"", b"hello, I am text", b"\xff\xd8\xff" + b"\0" * 50, b"BM", b"RIFF0000WEBP"])
def test_other_bytes_are_refused(data):
    with pytest.raises(UndecodableImage):
        decode(data, max_pixels=MAX_PIXELS)


def heic(image: Image.Image, **options) -> bytes:
    pytest.importorskip("pillow_heif", reason="the extra heic is not installed")
    readable_types()  # registers HEIC with Pillow
    return encoded(image, "HEIF", **options)


def test_heic_is_upright_and_transparent_pixels_become_white():
    upright = Image.new("RGB", (96, 64), "white")
    upright.paste("black", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = heic(upright.transpose(Image.Transpose.ROTATE_90), exif=exif.tobytes())
    assert sniff(data) == "image/heic"
    assert canonical_type("image/heif") == "image/heic"
    image = decode(data, max_pixels=MAX_PIXELS)
    assert (image.mode, image.size) == ("RGB", (96, 64))
    assert max(image.getpixel((8, 8))) < 40
    assert min(min(image.getpixel(corner)) for corner in [(88, 8), (8, 56), (88, 56)]) > 215
    clear = decode(heic(Image.new("RGBA", (64, 64), (0, 0, 0, 0))), max_pixels=MAX_PIXELS)
    assert min(clear.getpixel((32, 32))) > 250


def test_large_or_truncated_heic_is_refused():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = heic(Image.fromarray(noise))
    with pytest.raises(TooLarge, match="64 x 64"):
        decode(data, max_pixels=1000)
    for length in (len(data) // 2, 100, 20, 13):
        with pytest.raises(UndecodableImage):
            decode(data[:length], max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"avif\0\0\0\0", "image/avif"),
        (b"heix\0\0\0\0", "image/heic"),
        (b"mif1\0\0\0\0mif1heic", "image/heic"),
        (b"mif1\0\0\0\0mif1avif", "image/avif"),
        (b"mif1\0\0\0\0", None),
        (b"isom\0\0\0\0mp42", None),
    ],
)
def test_container_brands_give_the_type(brands, kind):
    box = (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands
    assert sniff(box + b"heicavif" * 4) == kind  # bytes after the box are ignored


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF"])
def test_the_first_frame_of_other_kinds_too(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, green, blue = decode(data, max_pixels=MAX_PIXELS).getpixel((16, 16))
    assert red > 240
    assert max(green, blue) < 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_every_pillow_mode_becomes_rgb(mode):
    image = Image.new("L", (8, 8), 200)
    image = image.convert("RGB").convert(mode) if mode in ("LAB", "CMYK", "YCbCr", "RGBX") else image.convert(mode)
    decoded = decode(encoded(image, "TIFF"), max_pixels=MAX_PIXELS)
    assert (decoded.mode, decoded.size) == ("RGB", (8, 8))


def test_a_type_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setattr(sys.modules["imaging.decode"], "pillow_heif", None)
    with pytest.raises(UndecodableImage, match="image/heic"):
        decode(b"\0\0\0\x18ftypheic" + b"\0" * 40, max_pixels=MAX_PIXELS)


def test_too_many_pixels_are_refused_by_the_header_alone():
    header = giant_png(30_000, 30_000)[:200]  # the pixel data is missing
    with pytest.raises(TooLarge, match="30000 x 30000"):
        decode(header, max_pixels=64_000_000)


def test_only_the_callers_limit_applies():
    data = giant_png(10_000, 9_500)  # above Pillow's own warning threshold
    assert decode(data, max_pixels=100_000_000).size == (10_000, 9_500)


def test_a_jpeg_is_decoded_at_reduced_scale_with_nearly_equal_pixels():
    rows, columns = np.mgrid[0:800, 0:1200]
    smooth = np.stack([columns * 255 // 1200, rows * 255 // 800, 128 + 100 * np.sin(columns / 60)], axis=-1)
    data = encoded(Image.fromarray(smooth.astype(np.uint8)), "JPEG", quality=95)
    reduced = decode(data, max_pixels=MAX_PIXELS, target_px=32)
    assert 64 <= min(reduced.size) < 800
    full = decode(data, max_pixels=MAX_PIXELS).resize((150, 100), Image.Resampling.BOX)
    assert np.abs(np.asarray(full).astype(int) - np.asarray(reduced.resize((150, 100)))).mean() < 2


def test_a_box_is_decoded_finely_enough():
    data = encoded(Image.new("RGB", (800, 800), "teal"), "JPEG")
    small = load_pixels(data, PREPROCESSING, max_pixels=MAX_PIXELS, box=(0.4, 0.4, 0.1, 0.1))
    assert small.shape == (32, 32, 3)
    assert decode(data, max_pixels=MAX_PIXELS, target_px=320).size == (800, 800)


def test_exif_orientation_of_sixteen_bit_grey():
    values = np.zeros((32, 48), np.uint16)
    values[:16, :16] = 65535  # the top left corner is bright
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(values).transpose(Image.Transpose.ROTATE_90)
    image = decode(encoded(stored, "PNG", exif=exif), max_pixels=MAX_PIXELS)
    assert image.size == (48, 32)
    assert image.getpixel((4, 4)) == (255, 255, 255)
    assert image.getpixel((44, 28)) == (0, 0, 0)
