"""Intervals for shares."""

from __future__ import annotations

import math

_Z_95 = 1.959964  # of a 95 % interval


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share, from 0 to 1. Unlike a bootstrap's, that of 60 of 60 is not a point."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, _Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
