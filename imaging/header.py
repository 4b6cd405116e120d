"""What decoding an image will take, read from its header with bounded work, before any library sees the bytes.

A header may lie. Where memory and time do not follow from it (`ordinary` is False), `imaging.decoder` decodes the image
in a process of its own that cannot exceed the estimate.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from core.errors import UndecodableImage
from imaging.decode import check_size, readable_type

_FIXED_BYTES = 12 * 2**20  # tables of the libraries, strips that are converted, the stack of a thread
_UNKNOWN_PIXELS = 2**22  # assumed where the header does not say

# Beyond these limits, an image is not ordinary.
_MAX_SEGMENTS = 1000  # of a JPEG before its picture; profiles and thumbnails take a few dozen
_MAX_CHUNKS = 8192  # of a PNG; 20 MB in chunks of the usual size are 2,500
_MAX_TEXTS = 16  # of a PNG
_MAX_TAG_BYTES = 2**18  # values of an EXIF directory, which may overlap; Pillow copies each
_MAX_JPEG_WORK = 2**27  # pixels times scans; about half a second
_MAX_PNG_PIXELS = 2**24
_MAX_WEBP_PIXELS = 2**22

_EXIF_PREFIX = b"Exif\0\0"
_START_OF_SCAN = 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers, one for each kind of coding
_ORDINARY_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman codes: baseline, extended, progressive
_STANDALONE = frozenset(range(0xD0, 0xDA))  # markers without a length
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # of TIFF values
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS_PER_STRIP = 256, 257, 258, 259, 277, 278  # tags of TIFF
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_FAX = {2: "CCITT RLE", 3: "CCITT group 3", 4: "CCITT group 4", 32771: "CCITT RLE-W"}
_TAG_VALUE_BYTES = 60  # a Python integer in a tuple
_ISPE_WITHIN = 2**16  # bytes of an AVIF or HEIC file


@dataclass(frozen=True, kw_only=True)
class Header:
    """The declared size of an image, 0 x 0 if unknown, and what decoding it takes.

    `ordinary` means that the estimate is certain and that decoding takes under a second.
    """

    kind: str = ""
    width: int = 0
    height: int = 0
    decoded_pixels: int | None = None  # if not all of them
    tile: tuple[int, int] = (0, 0)
    extra_bytes: int = 0
    ordinary: bool = False

    @property
    def memory_bytes(self) -> int:
        """Return an estimate of the memory that decoding takes."""
        pixels = self.decoded_pixels
        if pixels is None:
            pixels = self.width * self.height or _UNKNOWN_PIXELS
        return _FIXED_BYTES + _FORMATS[self.kind].bytes_per_pixel * pixels + self.extra_bytes


def read_header(data: bytes, *, max_pixels: int, target_px: int | None = None) -> Header:
    """Return what the header declares. A JPEG is decoded at the smallest scale that suffices for `target_px`.

    Raises `UndecodableImage` if the bytes are not of a type that is read, `TooLarge` if image or tile have too many
    pixels.
    """
    kind = readable_type(data)
    try:
        header = _jpeg(data, target_px) if kind == "image/jpeg" else _FORMATS[kind].read(data)
    except (struct.error, IndexError):  # damaged: decoding will say so
        header = Header()
    check_size(header.width, header.height, max_pixels)
    check_size(*header.tile, max_pixels, "a tile")
    return replace(header, kind=kind)


def _jpeg(data: bytes, target_px: int | None = None) -> Header:
    frames: list[tuple[int, bytes]] = []
    exif: list[bytes] = []
    tag_bytes, at = 0, 2
    for _ in range(_MAX_SEGMENTS):
        start, marker, length = struct.unpack_from(">BBH", data, at)
        if start != 0xFF or marker < 0xC0 or marker in _STANDALONE or marker == 0xFF:
            break  # from here, Pillow searches byte by byte
        body = data[at + 4 : at + 2 + length]
        if marker == _START_OF_SCAN:
            tidy = len(frames) == 1 and len(exif) <= 1 and tag_bytes <= _MAX_TAG_BYTES
            return _jpeg_frame(data, at, *frames[-1], components=body[0], target_px=target_px, tidy=tidy)
        if marker in _FRAMES:
            frames.append((marker, body))
        elif marker == 0xE1 and body.startswith(_EXIF_PREFIX):
            exif.append(body)
            tag_bytes += _tag_bytes(body)
        elif marker == 0xE2 and body.startswith(b"MPF\0"):
            tag_bytes += _tag_bytes(body[4:])
        at += 2 + length
    return Header()


def _jpeg_frame(
    data: bytes, scan_at: int, marker: int, frame: bytes, *, components: int, target_px: int | None, tidy: bool
) -> Header:
    bits, height, width, count = struct.unpack_from(">BHHB", frame)
    sampling = [(code >> 4, code & 15) for code in frame[7 : 6 + 3 * count : 3]]
    pixels, scale = width * height, 1
    if target_px is not None:  # as Pillow's `draft` chooses it
        scale = next((s for s in (8, 4, 2) if s <= min(width, height) // (2 * target_px)), 1)
    scans, coefficients = 1, 0.0
    if marker not in _ORDINARY_FRAMES[:2] or components < count:  # all coefficients are in memory until the last scan
        scans = data.count(bytes((0xFF, _START_OF_SCAN)), scan_at)
        most = max((h for h, _ in sampling), default=1) * max((v for _, v in sampling), default=1)
        padded = (width + 31) * (height + 31)
        coefficients = padded * sum(h * v for h, v in sampling) / (most or 1)
    return Header(
        width=width,
        height=height,
        decoded_pixels=math.ceil(width / scale) * math.ceil(height / scale),
        extra_bytes=round(2 * coefficients) + 64 * count * width,
        ordinary=tidy and marker in _ORDINARY_FRAMES and bits == 8 and 0 < pixels * scans <= _MAX_JPEG_WORK,
    )


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from(">II", data, 16)
    texts = tag_bytes = 0
    at = 8
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            tidy = texts <= _MAX_TEXTS and tag_bytes <= _MAX_TAG_BYTES
            return Header(width=width, height=height, ordinary=tidy and width * height <= _MAX_PNG_PIXELS)
        length, name = struct.unpack_from(">I4s", data, at)
        at += 8
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            texts += 1
            if data.startswith(b"Raw profile", at):
                break  # it may be EXIF in hexadecimal
        elif name == b"eXIf":
            tag_bytes += _tag_bytes(data[at : at + length])
        elif name == b"acTL":
            break  # an animation
        at += length + 4
    return Header(width=width, height=height)


def _webp(data: bytes) -> Header:
    form = data[12:16]
    if form == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        tidy = True
    elif form == b"VP8L":
        (sides,) = struct.unpack_from("<I", data, 21)
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        tidy = True
    else:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        tidy = not data[20] & 2  # an animation
        at, chunks = 30, 0
        while tidy and at + 8 <= len(data):
            name, length = struct.unpack_from("<4sI", data, at)
            chunks += 1
            if name == b"EXIF":
                tidy = _tag_bytes(data[at + 8 : at + 8 + length]) <= _MAX_TAG_BYTES
            tidy = tidy and chunks <= _MAX_SEGMENTS
            at += 8 + length + length % 2
    return Header(width=width, height=height, ordinary=tidy and width * height <= _MAX_WEBP_PIXELS)


def _gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header(width=width, height=height)


def _bmp(data: bytes) -> Header:
    old = struct.unpack_from("<I", data, 14) == (12,)
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return Header(width=abs(width), height=abs(height))


def _tiff(data: bytes) -> Header:
    order = _byte_order(data)
    tags = {_BITS: 1, _SAMPLES: 1, _ROWS_PER_STRIP: 2**32}
    values = 0
    for tag, kind, count, value in _directory(data):
        values += count
        width = _TYPE_BYTES.get(kind, 0)
        if width * count > 4:
            (value_at,) = struct.unpack(order + "I", value)
            value = data[value_at : value_at + 4]  # noqa: PLW2901 - it was the offset
        if width in (2, 4):
            (tags[tag],) = struct.unpack_from(order + ("H" if width == 2 else "I"), value)
    if (fax := _FAX.get(tags.get(_COMPRESSION, 1))) is not None:
        # 300 damaged bytes in this coding stand for 64 million rows, each with a line on stderr.
        raise UndecodableImage(f"TIFF images in a fax coding ({fax}) are not read; save the image as PNG or JPEG")
    size = tags.get(_WIDTH, 0), tags.get(_HEIGHT, 0)
    tile = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    # libtiff decodes a whole strip or tile, which may be larger than the image.
    block_pixels = math.prod(tile) or size[0] * min(size[1], tags[_ROWS_PER_STRIP])
    block_bytes = block_pixels * tags[_SAMPLES] * max(1, tags[_BITS] // 8)
    return Header(width=size[0], height=size[1], tile=tile, extra_bytes=block_bytes + _TAG_VALUE_BYTES * values)


def _isobmff(data: bytes) -> Header:
    """Read the largest image that the properties of an AVIF or HEIC file declare."""
    width = height = at = 0
    while (at := data.find(b"ispe", at, _ISPE_WITHIN)) >= 0:
        size = struct.unpack_from(">II", data, at + 8)
        width, height = max((width, height), size, key=math.prod)
        at += 4
    return Header(width=width, height=height)


class _Format(NamedTuple):
    """How a header is read, and the bytes for each pixel while it is decoded and converted to RGB.

    Pillow stores RGB in 4 bytes. Measured as the growth of a decoder process; a test decodes every mode within them.
    """

    read: Callable[[bytes], Header]
    bytes_per_pixel: int


_FORMATS = {
    "image/jpeg": _Format(_jpeg, 8),
    "image/png": _Format(_png, 10),
    "image/webp": _Format(_webp, 20),
    "image/gif": _Format(_gif, 8),
    "image/bmp": _Format(_bmp, 8),
    "image/tiff": _Format(_tiff, 12),
    "image/avif": _Format(_isobmff, 16),
    "image/heic": _Format(_isobmff, 16),
}


def _byte_order(tiff: bytes) -> str:
    return "<" if tiff.startswith(b"II") else ">"


def _directory(tiff: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, number of values, and value or offset, of each entry of the first directory."""
    order = _byte_order(tiff)
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    entries = tiff[at + 2 : at + 2 + 12 * count]
    yield from struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12])


def _tag_bytes(exif: bytes) -> int:
    """Return how many bytes the values of an EXIF directory take, more than are allowed if that is unclear."""
    tiff = exif.removeprefix(_EXIF_PREFIX).removeprefix(_EXIF_PREFIX)
    try:
        if tiff.startswith((b"II*\0", b"MM\0*")):
            return sum(_TYPE_BYTES.get(kind, 0) * count for _, kind, count, _ in _directory(tiff))
    except struct.error:
        pass
    return _MAX_TAG_BYTES + 1
