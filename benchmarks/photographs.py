"""Images to measure with: made up, but as heavy to decode as photographs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """A JPEG with the frequencies of a photograph: smooth areas, edges, some grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(coarse)
    for _ in range(20):
        x, y, r = (int(random.integers(low, high)) for low, high in ((0, width), (0, height), (10, 90)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(random.integers(0, 256, 3).tolist()))
    grain = np.asarray(coarse, np.int16) + random.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_photographs(folder: Path, count: int, width: int, height: int) -> list[str]:
    """`count` different photographs as files in `folder`; their paths."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(photograph(number, width, height))
    return [str(path) for path in paths]


def bust_cache(image: bytes, number: int) -> bytes:
    """The same picture in bytes that no cache has seen: a decoder stops before what follows a JPEG's end."""
    return image + number.to_bytes(8, "big")
