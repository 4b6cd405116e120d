"""Images and connections that are valid and extreme.

`cases()` generates small image files that take gigabytes, minutes or a log without end to decode. `share` below 1 makes
them smaller, for tests. No image can harm by being looked at. `connect` is a client that is as extreme.
"""

import io
import random
import re
import select
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat

from PIL import Image, features

from imaging import readable_types

_SIDE = 8000  # 64 million pixels, the default limit
_BYTES = 20 * 10**6  # of a body, just below the default limit

Entry = tuple[int, int, int, int | bytes]  # tag, type, number of values, value or the bytes of the values


@dataclass(frozen=True, kw_only=True)
class Case:
    """Bodies to send at the same time."""

    name: str
    bodies: list[bytes]
    content_type: str


def cases(share: float = 1.0) -> Iterator[Case]:
    """Yield every case. With `share`, about that part of the bytes and of the pixels."""
    readable_types()  # registers HEIC with Pillow where its library is installed
    side, size = int(_SIDE * share**0.5), int(_BYTES * share)
    for name, body, copies in (
        ("webp_canvas", webp(side), 8),
        ("webp_frames", webp_frames(side, size), 1),
        ("jpeg_scans", jpeg(side, scans=200), 4),
        ("jpeg_many_scans", jpeg(1448, scans=size // 14), 1),
        ("jpeg_arithmetic", jpeg(side, scans=200, arithmetic=True), 2),
        ("jpeg_segments", jpeg_with(b"\xff\xe1\0\x09Exif\0\0x" * (size // 11)), 1),
        ("jpeg_fill", jpeg_with(b"\xff\0" * (size // 2)), 1),
        ("jpeg_tags", jpeg_with(_segment(0xE1, b"Exif\0\0" + overlapping_tags(60_000))), 8),
        ("png_interlaced", png(side, interlaced=True), 2),
        ("png_deep", png(side, depth=16), 2),
        ("png_texts", png(64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9)) * 60), 8),
        ("png_profile", png(64, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(size * 8), 9))), 8),
        ("png_chunks", png(64, chunk(b"tEXt", b"a\0") * (size // 14)), 1),
        ("png_tags", png(64, chunk(b"eXIf", overlapping_tags(min(size, 6 * 10**5)))), 2),
        ("png_line", png(1, height=side * side), 2),
        ("gif_canvas", gif(side), 4),
        ("gif_extensions", gif(64, b"\x21\xfe\1x\0" * (size // 5)), 1),
        ("gif_frames", gif(64, frames=size // 15), 1),
        ("gif_codes", encoded(Image.new("P", (side, side)), "GIF"), 2),
        ("bmp_header", bmp(side), 2),
        ("tiff_fax", tiff_fax(int(64e6 * share)), 1),
        ("tiff_tile", tiff_tile(int(26_000 * share**0.5)), 1),
        ("tiff_strips", tiff_strips(size // 4), 1),
        ("tiff_values", tiff([*_grey(1, 1, 1), (273, 4, 1, b"x"), (65_000, 3, size // 2, bytes(size))]), 1),
        ("tiff_deflate", tiff_deflate(side), 2),
        ("tiff_directories", tiff([*_grey(1, 1, 1), (273, 4, 1, b"x"), (279, 4, 1, 1)], size // 6), 1),
        ("avif_lie", isobmff_lie("AVIF", side) if features.check("avif") else b"", 2),
        ("heic_lie", isobmff_lie("HEIF", side), 2),
    ):
        if body:
            kind = {"avif": "image/avif", "heic": "image/heic"}.get(name[:4], f"image/{name.partition('_')[0]}")
            yield Case(name=name, bodies=[body] * copies, content_type=kind)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def webp(side: int) -> bytes:
    """Return one colour in no bits per pixel: the size is that of the header alone."""
    data = bytearray(encoded(Image.new("RGBA", (1, 1), (10, 20, 30, 128)), "WEBP", lossless=True))
    data[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14 | 1 << 28)
    return bytes(data)


def webp_frames(side: int, size: int) -> bytes:
    pixel = webp(1)[12:]
    dots = bytes(6) + bytes(6) + bytes(4)  # offset 0, 1 x 1 pixels, no duration
    frame = b"ANMF" + struct.pack("<I", len(dots) + len(pixel)) + dots + pixel
    canvas = (side - 1).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + canvas
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + frame * (size // len(frame))
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(side: int, *, scans: int, arithmetic: bool = False) -> bytes:
    """Return a grey progressive JPEG whose coefficients are all 0, in about 95 bytes a scan."""

    def packed(bits: str) -> bytes:
        return int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big").replace(b"\xff", b"\xff\0")

    def scan(first: int, last: int, bits: int, code: str) -> bytes:
        data = bytes(64) if arithmetic else packed(code)
        return _segment(0xDA, bytes((1, 1, 0, first, last, bits))) + data

    blocks = left = (-(-side // 8)) ** 2
    runs = ""
    while left >= 16_384:
        run = min(left, 32_767)
        runs, left = runs + "0" + format(run - 16_384, "014b"), left - run
    runs += "10" * left
    frame = _segment(0xCA if arithmetic else 0xC2, struct.pack(">BHH", 8, side, side) + b"\1\1\x11\0")
    tables = _segment(0xC4, b"\0\1" + bytes(16)) + _segment(0xC4, b"\x10\1\1" + bytes(14) + b"\xe0\0")
    start = b"\xff\xd8" + _segment(0xDB, b"\0" + b"\1" * 64) + frame + tables + scan(0, 0, 0, "0" * blocks)
    return start + scan(1, 63, 1, runs) + scan(1, 63, 0x10, runs) * scans + b"\xff\xd9"


def jpeg_with(before: bytes) -> bytes:
    data = encoded(Image.new("RGB", (64, 64), "teal"), "JPEG")
    return data[:2] + before + data[2:]


def overlapping_tags(size: int) -> bytes:
    """Return an EXIF block in which each of many tags takes the whole block as its value."""
    count = min(size // 24, 65_000)
    entries = b"".join(struct.pack("<HHII", tag, 7, size - 8, 8) for tag in range(1, count + 1))
    block = b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)
    return block.ljust(size, b"\0")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def zeros(row_bytes: int, rows: int) -> bytes:
    """Return compressed rows of zeros. They are never in memory together."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(row_bytes)) for _ in range(rows)) + packer.flush()


def png(width: int, more: bytes = b"", *, height: int = 0, depth: int = 8, interlaced: bool = False) -> bytes:
    height = height or width
    rows = height * 2 if interlaced else height  # seven passes have less than twice the rows
    pixels = zeros(1 + width * 4 * depth // 8, rows)
    header = struct.pack(">IIBBBBB", width, height, depth, 6, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(side: int, before: bytes = b"", *, frames: int = 1) -> bytes:
    """Return frames of one pixel, in LZW codes, on a canvas of any size."""
    frame = b"\x2c" + bytes(4) + b"\1\0\1\0\0" + b"\2\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(6) + before + frame * frames + b"\x3b"


def bmp(side: int) -> bytes:
    """Return a bitmap that ends after its header and palette."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 0, 0, 0, 0, 0, 0)
    size = 14 + len(header) + 1024
    return b"BM" + struct.pack("<IHHI", size, 0, 0, size) + header + bytes(1024)


def tiff(entries: list[Entry], directories: int = 0) -> bytes:
    """Return a TIFF of these entries. Its strips and tiles are the bytes of tags 273 and 324."""
    directory_bytes = 2 + 12 * len(entries) + 4
    data = b""
    packed: list[bytes] = []
    for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
        offset = value if isinstance(value, int) else 8 + directory_bytes + len(data)
        data += b"" if isinstance(value, int) else value
        packed.append(struct.pack("<HHII", tag, kind, count, offset))
    first = struct.pack("<H", len(entries)) + b"".join(packed)
    more = 8 + directory_bytes + len(data)
    chain = b"".join(struct.pack("<HI", 0, more + 6 * (number + 1)) for number in range(directories))
    following = struct.pack("<I", more if directories else 0)
    return b"II*\0" + struct.pack("<I", 8) + first + following + data + chain


def _grey(width: int, height: int, compression: int, bits: int = 8) -> list[Entry]:
    return [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1)]


def tiff_fax(rows: int) -> bytes:
    """Return noise in the coding of fax machines, for which libtiff writes a line to stderr per row."""
    noise = random.Random(1).randbytes(300)
    return tiff([*_grey(1, rows, 2, bits=1), (273, 4, 1, noise), (278, 4, 1, rows), (279, 4, 1, len(noise))])


def tiff_tile(side: int) -> bytes:
    """Return an image of 16 x 16 pixels in one far larger tile."""
    tile = zeros(side, side)
    return tiff([*_grey(16, 16, 8), (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, tile), (325, 4, 1, len(tile))])


def tiff_strips(count: int) -> bytes:
    offsets = struct.pack("<I", 8) * count
    return tiff([*_grey(1, count, 1), (273, 4, count, offsets), (278, 4, 1, 1), (279, 4, 1, 1)])


def tiff_deflate(side: int) -> bytes:
    """Return 16-bit RGB, black, in one strip."""
    strip, bits = zeros(side * 6, side), struct.pack("<HHH", 16, 16, 16)
    entries: list[Entry] = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 3, bits), (259, 3, 1, 8), (262, 3, 1, 2)]
    return tiff([*entries, (273, 4, 1, strip), (277, 3, 1, 3), (278, 4, 1, side), (279, 4, 1, len(strip))])


def isobmff_lie(form: str, side: int) -> bytes:
    """Return an AVIF or HEIC file whose header declares 64 x 64 pixels for a far larger frame."""
    if form not in Image.SAVE:
        return b""
    data = encoded(Image.new("RGB", (side, side), "teal"), form, quality=10, speed=10)
    size = b"ispe\0\0\0\0" + struct.pack(">II", side, side)
    return data.replace(size, size[:8] + struct.pack(">II", 64, 64))


# ---- connections ----

TIMEOUT_S = 60
GET = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
LAST_GET = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
POST = b"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: %b\r\n"
CHUNKED = POST % b"image/png" + b"Transfer-Encoding: chunked\r\n\r\n"


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def send(host: str, port: int, pieces: Iterable[bytes], *, pause_s: float = 0) -> bytes:
    """Send pieces until the service closes the connection, with a pause also until it responds. Then read."""
    received = bytearray()
    with socket.create_connection((host, port), TIMEOUT_S) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                connection.sendall(piece)
                if pause_s and select.select([connection], [], [], pause_s)[0]:
                    break
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                received += part
    return bytes(received)


def posted(content_type: bytes, body: bytes) -> list[bytes]:
    """Return a request to recognise `body`, in pieces to send."""
    return [POST % content_type + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body]


_EMPTY_PART = b"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n\r\n"
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(GET)
CONNECTIONS: dict[str, Callable[[], Iterable[bytes]]] = {  # what each sends
    "unread": lambda: repeat(GET * 8000, 400),  # 100 MB, before any response is read
    "pipelined": lambda: [GET * 999 + LAST_GET],
    "large_second_head": lambda: [GET + b"GET /livez HTTP/1.1\r\nX: " + b"x" * 200_000],
    "many_headers": lambda: [b"GET /livez HTTP/1.1\r\n" + b"a:b\r\n" * 10_000 + b"\r\n"],
    "slow_chunks": lambda: chain([CHUNKED], repeat(b"1\r\nx\r\n")),
    "endless_chunk_extension": lambda: chain([CHUNKED + b"1;"], repeat(b"x" * 65536)),
    "endless_trailer": lambda: chain([CHUNKED + b"1\r\nx\r\n0\r\nX: "], repeat(b"x" * 65536)),
    # The body looks like a request, and a request follows.
    "upgrade_with_body": lambda: [POST % b"image/png" + _UPGRADE + GET + LAST_GET],
    "multipart_parts": lambda: posted(b"multipart/form-data; boundary=b", _EMPTY_PART * 400_000 + b"--b--\r\n"),
    "wide_json": lambda: posted(b"application/json", b"[" + b"[]," * 6_900_000 + b"0]"),
}


def connect(name: str, host: str, port: int) -> bytes:
    """Open a connection of `CONNECTIONS`, and return all that the service sent until it closed it."""
    return send(host, port, CONNECTIONS[name](), pause_s=0.05 if name == "slow_chunks" else 0)
