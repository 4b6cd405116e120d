"""The most specific entity or type that is certain: what a bundle stores, applied. `export.levels` fits it.

The best candidates of a query become a distribution, the softmax of `slope` times their scores. A type has the sum of
the candidates that are of it or of a descendant. A logistic regression turns the sum into the probability of being
right. Its other features are the best score within the level, the background, whether the level is an entity, and the
logarithm of the number of entities that it covers.

The same number of candidates is used whatever the number of predictions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from operator import mul
from typing import Any, NamedTuple, Self

from core.errors import BundleAltered
from index.types import TypeHierarchy

CERTAIN = 0.9
MAX_SHARE = 0.1  # of the catalog, that a type may cover
_CACHED = 8192  # lists of types
_MIN_SUM = 1e-4

SizedType = tuple[str, int]  # a type's key, and how many entities it covers


class Level(NamedTuple):
    """The best candidate (`key` is None) or a type, with what its confidence depends on."""

    key: str | None
    size: int
    sum: float
    best: float

    def features(self, background: float) -> tuple[float, ...]:
        odds = math.log(max(self.sum, _MIN_SUM) / max(1.0 - self.sum, _MIN_SUM))
        return 1.0, odds, self.best, background, float(self.key is None), math.log(max(self.size, 1))


class TypeLevels:
    """The types of a bundle that can be a level, because they cover few enough of its entities. Thread-safe."""

    def __init__(self, types: TypeHierarchy, sizes: Mapping[str, int], entities: int) -> None:
        """`sizes` has how many of the `entities` a type covers, by its key, with those of its descendants."""
        self.types = types
        self._of = lru_cache(maxsize=_CACHED)(partial(_sized, types, sizes, MAX_SHARE * entities))  # no reference cycle

    def of(self, types: tuple[str, ...]) -> tuple[SizedType, ...]:
        """Return the types of a record, given by name, and their ancestors, without those that cover too much."""
        return self._of(types)


def _sized(
    hierarchy: TypeHierarchy, sizes: Mapping[str, int], max_size: float, types: tuple[str, ...]
) -> tuple[SizedType, ...]:
    sized = ((key, sizes.get(key, 0)) for key in sorted(hierarchy.ancestors(types)))
    return tuple((key, size) for key, size in sized if size <= max_size)


@dataclass(frozen=True, kw_only=True)
class LevelModel:
    """The slope of the softmax, and the weights of the features."""

    slope: float
    weights: tuple[float, ...]

    def levels(
        self, scores: Sequence[float], background: float, types: Sequence[Sequence[SizedType]]
    ) -> Iterator[tuple[Level, float]]:
        """Yield each level of `summed` with the probability that it is right."""
        for level in summed(self.slope, scores, types):
            yield level, sigmoid(sum(map(mul, self.weights, level.features(background))))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": list(self.weights)}

    @classmethod
    def from_dict(cls, content: Any) -> Self:
        """Read what `to_dict` returns. Raise `BundleAltered`."""
        try:
            slope, weights = float(content["slope"]), tuple(map(float, content["weights"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleAltered("calibration.level is malformed; export the bundle again") from error
        if len(weights) != len(Level(None, 1, 1.0, 0.0).features(0.0)):
            raise BundleAltered(f"calibration.level has {len(weights)} weights; export the bundle again")
        return cls(slope=slope, weights=weights)


def sigmoid(logit: float) -> float:
    power = math.exp(-abs(logit))  # cannot overflow
    return (1.0 if logit >= 0 else power) / (1.0 + power)


def summed(slope: float, scores: Sequence[float], types: Sequence[Sequence[SizedType]]) -> Iterator[Level]:
    """Yield the best candidate, then each type of a candidate. `scores` fall, and `types` has those of each."""
    powers = [math.exp(slope * (score - scores[0])) for score in scores]
    total = sum(powers)
    yield Level(None, 1, powers[0] / total, scores[0])
    sums: dict[SizedType, float] = {}
    best: dict[SizedType, float] = {}
    for power, score, of_candidate in zip(powers, scores, types, strict=True):
        for sized in of_candidate:
            sums[sized] = sums.get(sized, 0.0) + power / total
            best.setdefault(sized, score)
    for sized, each in sums.items():
        yield Level(*sized, each, best[sized])


def most_specific(levels: Iterable[tuple[Level, float]], certain: float = CERTAIN) -> tuple[Level, float] | None:
    """Return the level of the fewest entities whose confidence is high enough; of several, the most certain one.

    The levels begin with an entity.
    """
    found: list[tuple[Level, float]] = []
    for level, confidence in levels:
        if confidence >= certain:
            if level.key is None:
                return level, confidence
            found.append((level, confidence))
    return min(found, key=lambda each: (each[0].size, -each[1], each[0].key), default=None)
