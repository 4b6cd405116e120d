"""Bodies that mean harm: mutated files of every kind that is read, bombs, polyglots, and types that lie."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, features

KINDS = tuple(
    kind for kind in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP") if kind != "AVIF" or features.check("avif")
)
_TAILS = (b"<script>alert(1)</script>", b"PK\x03\x04" + b"\0" * 26, b"%PDF-1.7", b"GIF89a", b"\xff\xd8\xff")
_NASTY = (0, 1, 0x7F, 0x80, 0xFF)


def hostile_bodies(count: int, seed: int = 0) -> Iterator[tuple[bytes, str]]:
    """`count` bodies with the content type that is claimed for each; the same for the same seed."""
    chance = random.Random(seed)
    whole = {kind: _encoded(kind) for kind in KINDS}
    bombs = (_bomb(30_000, 30_000), _bomb(2**31 - 1, 2**31 - 1), _bomb(1, 200_000_000))
    for _ in range(count):
        kind = chance.choice(KINDS)
        true_type = f"image/{kind.lower()}"
        claimed = true_type if chance.random() < 0.6 else f"image/{chance.choice(KINDS).lower()}"
        what = chance.random()
        if what < 0.85:
            yield _mutated(whole[kind], chance), claimed
        elif what < 0.9:
            yield chance.choice(bombs), claimed
        elif what < 0.95:
            first, second = chance.choice(_TAILS), whole[kind]
            yield (first + second if chance.random() < 0.5 else second + first), claimed
        else:
            yield chance.randbytes(chance.randrange(1, 2000)), claimed


def _encoded(kind: str) -> bytes:
    noise = np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def _mutated(whole: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, most near the head, where sizes stand; then perhaps a part cut out, doubled or cut off."""
    data = bytearray(whole)
    reach = 24.0 if chance.random() < 0.5 else len(data) / 8
    for _ in range(chance.randint(1, 8)):
        place = min(int(chance.expovariate(1 / reach)), len(data) - 1)
        data[place] = chance.choice((*_NASTY, chance.randrange(256)))
    start, length = chance.randrange(len(data) // 2), chance.randrange(1, len(data) // 2)
    change = chance.randrange(4)
    if change == 1:
        del data[start : start + length]
    elif change == 2:
        data[start:start] = data[start : start + length]
    elif change == 3:
        del data[-length:]
    return bytes(data)


def _bomb(width: int, height: int) -> bytes:
    """A one-bit PNG that says it is this large, in a few hundred bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * 100_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
