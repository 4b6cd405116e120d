"""How sure a figure is, and how far confidences can be trusted.

Shapes: N queries, R resamplings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.metrics import harmonic_mean

RESAMPLINGS = 2000
CALIBRATION_BINS = 15

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]


class Bootstrap:
    """95 % intervals by resampling queries with replacement (percentile bootstrap); the seed fixes them."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def share(self, hits: int, queries: int) -> Interval:
        """Of a share of queries, in percent."""
        return percentile_interval(self._shares(hits, queries))

    def harmonic_mean(self, seen: tuple[int, int], unseen: tuple[int, int]) -> Interval:
        """Of the HM of two shares in percent, each as (hits, queries) and resampled by itself."""
        pairs = zip(self._shares(*seen), self._shares(*unseen), strict=True)
        return percentile_interval(np.array([harmonic_mean(one, other) for one, other in pairs]))

    def auroc(self, positive: Sequence[float], negative: Sequence[float], resamplings: int = 500) -> Interval:
        """Of the area that `auroc` gives."""
        drawn = [
            auroc(self._rng.choice(positive, len(positive)), self._rng.choice(negative, len(negative)))
            for _ in range(resamplings)
        ]
        return percentile_interval(np.array(drawn))

    def _shares(self, hits: int, queries: int) -> Floats:
        """Drawing `queries` of as many with replacement, each a hit or not, is a binomial draw."""
        return 100 * self._rng.binomial(queries, hits / queries, RESAMPLINGS) / queries


def percentile_interval(values_R: Floats) -> Interval:
    """The middle 95 % of what resamplings gave."""
    low, high = np.percentile(values_R, (2.5, 97.5))
    return float(low), float(high)


def median_interval(samples: Sequence[float]) -> Interval:
    """Of the median of samples, by resampling them."""
    drawn = np.random.default_rng(0).choice(samples, (RESAMPLINGS, len(samples)))
    return percentile_interval(np.median(drawn, axis=1))


def auroc(positive: Any, negative: Any) -> float:
    """The area under the ROC curve: how often a positive value is above a negative one, a tie being half a win."""
    ordered = np.sort(np.asarray(negative, np.float64))
    below = np.searchsorted(ordered, positive, side="left")
    up_to = np.searchsorted(ordered, positive, side="right")
    return float((below + up_to).mean() / 2 / len(ordered))


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Answers of about the same confidence, and how many of them were right."""

    count: int
    confidence: float
    accuracy: float


def reliability(confidences_N: Sequence[float], correct_N: Sequence[bool]) -> list[ReliabilityBin]:
    """The bins of equal width that are not empty, by rising confidence (0 to 1)."""
    confidences, correct = np.asarray(confidences_N, np.float64), np.asarray(correct_N, bool)
    bins_N = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return [
        ReliabilityBin(
            count=int((bins_N == number).sum()),
            confidence=float(confidences[bins_N == number].mean()),
            accuracy=float(correct[bins_N == number].mean()),
        )
        for number in np.unique(bins_N)
    ]


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """The expected calibration error: the mean distance between confidence and accuracy, by the answers in a bin."""
    total = sum(each.count for each in bins)
    return sum(each.count * abs(each.confidence - each.accuracy) for each in bins) / total
