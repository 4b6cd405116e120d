"""Timing many things in turns, so that what else the machine does falls on all of them and can be told from a change.

Every round times each thing for a moment, in an order that rotates, and right beside it a fixed piece of work whose
time says how fast the machine is just then. A sample is the median of one such moment: a run gives as many samples of
each thing as there are rounds, spread over its whole length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.statistics import median_interval

_MOST_CALLS = 200  # of one thing in one round
_REFERENCE_RUNS = 3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One thing to time: `call(i)` is given a number that grows, and does `items` of what is counted.

    `name` is a path in the figures: `search/10000 exact`.
    """

    name: str
    call: Callable[[int], object]
    items: int = 1


@dataclass(kw_only=True)
class Metric:
    """Samples of one figure, the better the lower or the higher, and how long the reference took beside each."""

    unit: str = "ms"
    better: str = "lower"
    samples: list[float] = field(default_factory=list)
    reference_ms: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Median, its 95 % interval (bootstrap), and every sample: what `wikiclip bench compare` reads."""
        low, high = median_interval(self.samples)
        return {
            "median": _rounded(float(np.median(self.samples))),
            "interval": [_rounded(low), _rounded(high)],
            "unit": self.unit,
            "better": self.better,
            "samples": [_rounded(value) for value in self.samples],
            "reference_ms": [_rounded(value) for value in self.reference_ms],
        }


class Reference:
    """A fixed piece of work on one core: a matrix product, a pass over memory, and Python's own work."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._matrix = rng.standard_normal((192, 192), dtype=np.float32)
        self._memory = np.ones(2_000_000, np.float32)
        self._time_ms()

    def time_ms(self) -> float:
        """The least of a few runs, in milliseconds."""
        return min(self._time_ms() for _ in range(_REFERENCE_RUNS))

    def _time_ms(self) -> float:
        started = time.perf_counter()
        np.einsum("ij,jk->ik", self._matrix, self._matrix)  # einsum has one thread, whatever BLAS has
        float(self._memory.sum())
        sum(number * number for number in range(20_000))
        return 1000 * (time.perf_counter() - started)


def sample(
    probes: Sequence[Probe], *, rounds: int, moment_s: float, until: float | None = None, description: str = "rounds"
) -> dict[str, Metric]:
    """Milliseconds an item of each probe, a sample a round, each over `moment_s` seconds and one call at least.

    Ends early, after at least two rounds, when `time.monotonic()` is past `until`.
    """
    reference = Reference()
    metrics = {probe.name: Metric() for probe in probes}
    calls = dict.fromkeys(metrics, 0)
    for probe in probes:
        probe.call(0)  # what is made at the first call is not counted
    order = list(probes)
    for done in tqdm(range(rounds), desc=description, unit="round"):
        if done >= 2 and until is not None and time.monotonic() > until:
            break
        order = order[1:] + order[:1]
        for probe in order:
            metrics[probe.name].reference_ms.append(reference.time_ms())
            taken: list[float] = []
            while not taken or (sum(taken) < moment_s and len(taken) < _MOST_CALLS):
                calls[probe.name] += 1
                started = time.perf_counter()
                probe.call(calls[probe.name])
                taken.append(time.perf_counter() - started)
            metrics[probe.name].samples.append(1000 * float(np.median(taken)) / probe.items)
    return metrics


def nested(metrics: dict[str, Metric]) -> dict[str, Any]:
    """The figures of metrics whose names are paths, as nested objects."""
    tree: dict[str, Any] = {}
    for name, metric in metrics.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = metric.figures()
    return tree


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
