"""What is asked of a recogniser and what it answers, free of HTTP and of heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Box = tuple[float, float, float, float]  # x, y, width, height as fractions of the upright image

MAX_TOP_K = 100


@dataclass(frozen=True, kw_only=True)
class RecognizeOptions:
    """`min_score` is a cosine and drops predictions below it; `types` lets through entities with any of them.

    `lang` asks for titles in that language where there are; `box` asks about a region of the image.
    """

    top_k: int = 5
    min_score: float | None = None
    types: tuple[str, ...] = ()
    lang: str | None = None
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`score` is a cosine; `confidence` the probability of being right, None where the bundle has no calibration."""

    rank: int
    entity_id: str
    title: str
    score: float
    confidence: float | None
    description: str | None
    url: str | None
    symbol: str | None
    types: tuple[str, ...]
    has_thumbnail: bool


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Predictions, best first. `abstained` says that the best one is probably wrong, None without calibration.

    `cached` says that the image was not encoded for this answer. `timings_ms` has the stages that took place
    (`decode`, `queue`, `encode`, `search`) and `total`.
    """

    model: str
    bundle: str
    cached: bool
    abstained: bool | None
    predictions: tuple[Prediction, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)
