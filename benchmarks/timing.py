"""Timing calls: warmed up, one by one, reported as percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def percentiles_ms(call: Callable[[int], object], *, repeats: int, warm_up: int) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds of `call(i)`, after `warm_up` calls that are not counted."""
    for i in range(warm_up):
        call(i)
    taken_ms = np.empty(repeats)
    for i in range(repeats):
        started = time.perf_counter()
        call(warm_up + i)
        taken_ms[i] = 1000 * (time.perf_counter() - started)
    p50, p90, p99 = np.percentile(taken_ms, (50, 90, 99)).round(3).tolist()
    return {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99}
