"""Images that show nothing, or no thing in particular: what must not be taken for an entity.

A confidence fitted to queries for entities alone would judge them by extrapolation. Shapes: S = size_px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float64]


def outlier_images(count: int, size_px: int, *, seed: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields `[S, S, 3]`: plain colours, gradients, blobs, noise, stripes, textures, regions and boxes, in turn."""
    rng = np.random.default_rng(seed)
    for kind in islice(cycle(_KINDS), count):
        yield np.clip(kind(rng, size_px), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> FloatArray:
    grey = rng.random() < 0.3
    return np.full(3, rng.uniform(0, 255)) if grey else rng.uniform(0, 255, 3)


def _ramp(rng: np.random.Generator, size_px: int) -> FloatArray:
    """0 to 1 along a line or outwards from a point, `[S, S]`."""
    y, x = np.mgrid[-1 : 1 : size_px * 1j, -1 : 1 : size_px * 1j]
    if rng.random() < 0.6:
        angle = rng.uniform(0, 2 * np.pi)
        ramp: FloatArray = 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / (2 * np.sqrt(2))
    else:
        centre_x, centre_y = rng.uniform(-0.7, 0.7, 2)
        ramp = np.clip(np.hypot(x - centre_x, y - centre_y) / rng.uniform(0.7, 2.5), 0, 1)
    return ramp


def _between(rng: np.random.Generator, share: FloatArray) -> FloatArray:
    return _colour(rng) * share[..., None] + _colour(rng) * (1 - share[..., None])


def _enlarged(pixels: FloatArray, size_px: int) -> FloatArray:
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC), np.float64)


def _plain(rng: np.random.Generator, size_px: int) -> FloatArray:
    return np.tile(_colour(rng), (size_px, size_px, 1))


def _gradient(rng: np.random.Generator, size_px: int) -> FloatArray:
    return _between(rng, _ramp(rng, size_px))


def _blobs(rng: np.random.Generator, size_px: int) -> FloatArray:
    across = int(rng.integers(2, 24))
    blobs = rng.uniform(0, 255, (across, across, 3))
    return _enlarged(blobs.mean(axis=2, keepdims=True).repeat(3, 2) if rng.random() < 0.3 else blobs, size_px)


def _noise(rng: np.random.Generator, size_px: int) -> FloatArray:
    share = rng.uniform(0.1, 1)
    noise = rng.uniform(0, 255, (size_px, size_px, 3 if rng.random() < 0.5 else 1))
    return noise * share + _colour(rng) * (1 - share)


def _stripes(rng: np.random.Generator, size_px: int) -> FloatArray:
    wave = np.sin(_ramp(rng, size_px) * rng.uniform(8, 150))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    if rng.random() < 0.3:  # checks
        wave = wave * np.sign(np.sin(_ramp(rng, size_px) * rng.uniform(8, 120)))
    return _between(rng, (wave + 1) / 2)


def _texture(rng: np.random.Generator, size_px: int) -> FloatArray:
    """Noise at every scale, as of clouds, stone or cloth."""
    persistence = rng.uniform(0.4, 0.9)
    texture = np.tile(_colour(rng), (size_px, size_px, 1))
    contrast = rng.uniform(0.3, 1)
    for octave in range(6):
        layer = _enlarged(rng.uniform(0, 255, (3 << octave, 3 << octave, 3)), size_px) - 128
        texture += contrast * persistence**octave * layer
    return texture


def _regions(rng: np.random.Generator, size_px: int) -> FloatArray:
    edges = np.sort(rng.uniform(0.2, 0.8, int(rng.integers(1, 4))))
    colours: FloatArray = np.array([_colour(rng) for _ in range(len(edges) + 1)])
    return colours[np.digitize(_ramp(rng, size_px), edges)]


def _boxes(rng: np.random.Generator, size_px: int) -> FloatArray:
    image = _plain(rng, size_px)
    for _ in range(int(rng.integers(2, 12))):
        left, top = rng.integers(0, size_px, 2)
        width, height = rng.integers(size_px // 20 + 1, size_px * 2 // 3 + 2, 2)
        image[top : top + height, left : left + width] = _colour(rng)
    return image


_KINDS: tuple[Callable[[np.random.Generator, int], FloatArray], ...] = (
    _plain, _gradient, _blobs, _noise, _stripes, _texture, _regions, _boxes,
)  # fmt: skip
