"""Where the things in an image are: windows whose patches differ from those around them.

Every window of a coarse grid is scored by the distance between the mean of its patch tokens and that of a ring around
it, as saliency from centre and surround is (Itti, Koch and Niebur, PAMI 1998). A thing is where both are unlike.

Shapes: P patches, C patch channels, S = side of the grid, W windows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from core.arrays import BoolArray, Float32Array, normalised
from wikiclip.answers import Box, Recognition, Region

MAX_REGIONS = 8
_MIN_CONFIDENCE = 0.5
_MAX_SIDE = 10  # of the grid; finer ones are averaged
_MIN_WINDOW = 0.2  # of a side of the image
_MAX_WINDOW = 0.8  # of the area; the whole image is a candidate, too
_MAX_ASPECT = 2.0
_RING = 2  # cells around a window
_MAX_PROPOSED_OVERLAP = 0.4  # intersection over union
_MAX_CHOSEN_OVERLAP = 0.4  # of the smaller box


def propose(patch_tokens_PC: Float32Array, turned_PC: Float32Array, limit: int) -> list[Box]:
    """Return up to `limit` boxes that may show one thing each, in fractions of the image, the most distinct first.

    `turned_PC` are the patches of the image turned by 180 degrees. Strided convolutions shift what they see by up to
    half a patch, and the mean of both is not shifted. None are returned if the patches do not form a square.
    """
    side = math.isqrt(len(patch_tokens_PC))
    if side < 2 or side * side != len(patch_tokens_PC):
        return []
    tokens_PC = _coarse((normalised(patch_tokens_PC) + normalised(turned_PC[::-1])).reshape(side, side, -1))
    boxes, weights_WP, overlap_WW = _windows(math.isqrt(len(tokens_PC)))
    # The squared distance of two means of tokens, from the tokens' products.
    distances_W = np.einsum("wp,wp->w", weights_WP @ (tokens_PC @ tokens_PC.T), weights_WP)
    proposed: list[Box] = []
    while len(proposed) < limit and math.isfinite(distances_W.max()):
        window = int(distances_W.argmax())
        proposed.append(boxes[window])
        distances_W[overlap_WW[window]] = -np.inf
    return proposed


def choose(answers: Sequence[tuple[Box, Recognition]]) -> tuple[Region, ...]:
    """Return up to `MAX_REGIONS` regions, the most certain first, without background and without overlaps.

    Background is what is probably not in the catalog, or whose best prediction is more likely wrong than right. Without
    calibration nothing is taken for background.
    """
    regions = [
        Region(box=box, predictions=each.predictions, in_catalog_probability=each.in_catalog_probability)
        for box, each in answers
        if each.predictions and not each.abstained
    ]
    chosen: list[Region] = []
    for region in sorted(regions, key=_certainty, reverse=True):
        calibrated = region.predictions[0].confidence is not None
        if calibrated and _certainty(region) < _MIN_CONFIDENCE:
            break
        if not any(_overlap(region.box, other.box) for other in chosen):
            chosen.append(region)
    return tuple(chosen[:MAX_REGIONS])


def _certainty(region: Region) -> float:
    best = region.predictions[0]
    return best.score if best.confidence is None else best.confidence


def _coarse(tokens_SSC: Float32Array) -> Float32Array:
    """Return the tokens [P, C] of a grid with sides of at most `_MAX_SIDE`: normalised means of squares of patches."""
    side = len(tokens_SSC)
    cells = math.ceil(side / math.ceil(side / _MAX_SIDE))
    starts = np.arange(cells) * side // cells
    sums_SSC: Float32Array = np.add.reduceat(np.add.reduceat(tokens_SSC, starts, axis=0), starts, axis=1)
    return normalised(sums_SSC.reshape(cells * cells, -1))


@lru_cache(maxsize=8)
def _windows(side: int) -> tuple[list[Box], Float32Array, BoolArray]:
    """Return the windows of a grid, weights [W, P], and which windows overlap too much to propose both.

    The product of weights and tokens is the difference of the means inside and around a window, times the fourth root
    of how many cells would give it the same variance.
    """
    lengths = range(max(1, math.ceil(_MIN_WINDOW * side)), side + 1)
    boxes: list[Box] = []
    inside_WP, around_WP = [], []
    for height, width in itertools.product(lengths, lengths):
        if max(width, height) > _MAX_ASPECT * min(width, height) or width * height > _MAX_WINDOW * side * side:
            continue
        for top, left in itertools.product(range(side - height + 1), range(side - width + 1)):
            inside, around = np.zeros((2, side, side), np.float32)
            inside[top : top + height, left : left + width] = 1
            around[max(top - _RING, 0) : top + height + _RING, max(left - _RING, 0) : left + width + _RING] = 1
            boxes.append((left / side, top / side, width / side, height / side))
            inside_WP.append(inside.reshape(-1))
            around_WP.append((around - inside).reshape(-1))
    windows_WP, rings_WP = np.stack(inside_WP), np.stack(around_WP)
    cells_W1, ring_cells_W1 = (each_WP.sum(axis=1, keepdims=True) for each_WP in (windows_WP, rings_WP))
    scale_W1 = (cells_W1 * ring_cells_W1 / (cells_W1 + ring_cells_W1)) ** 0.25
    shared_WW = windows_WP @ windows_WP.T
    overlap_WW = shared_WW > _MAX_PROPOSED_OVERLAP * (cells_W1 + cells_W1.T - shared_WW)
    return boxes, scale_W1 * (windows_WP / cells_W1 - rings_WP / ring_cells_W1), overlap_WW


def _overlap(box: Box, other: Box) -> bool:
    """Return whether two boxes share too much of the smaller one for both to be chosen."""
    width, height = (
        min(box[axis] + box[axis + 2], other[axis] + other[axis + 2]) - max(box[axis], other[axis]) for axis in (0, 1)
    )
    smaller = min(box[2] * box[3], other[2] * other[3])
    return width > 0 and height > 0 and width * height > _MAX_CHOSEN_OVERLAP * smaller
