"""What is asked of a recogniser and what it answers, free of HTTP and of heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Box = tuple[float, float, float, float]  # x, y, width, height as fractions of the upright image

MAX_TOP_K = 100


@dataclass(frozen=True, kw_only=True)
class RecognizeOptions:
    """`min_score` is a cosine and drops predictions below it; `types` lets through entities with any of them.

    `lang` asks for titles in that language where there are; `box` asks about a region of the image; `explain`
    for the reasons with each prediction.
    """

    top_k: int = 5
    min_score: float | None = None
    types: tuple[str, ...] = ()
    lang: str | None = None
    box: Box | None = None
    explain: bool = False


@dataclass(frozen=True, kw_only=True)
class AttendedWord:
    """A word of an entity's text: where it stands, in characters, and its share of the adaptor's attention (0 to 1)."""

    word: str
    start: int
    end: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why an entity was found.

    `heat_map` has, in rows from the top, the cosine between each patch of the image and the entity, None for an encoder
    whose patches cannot be compared with entities; `region` is the part of the image that it covers. `words` are those
    of the entity's text that weighed most in making its embedding, heaviest first, None where the bundle keeps no text.
    """

    heat_map: tuple[tuple[float, ...], ...] | None
    region: Box
    words: tuple[AttendedWord, ...] | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """`score` is a cosine; `confidence` the probability of being right, None where the bundle has no calibration;
    `explanation` is None unless it was asked for."""

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
    explanation: Explanation | None = None


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """Predictions, best first. `known` is the probability that the entity is in the catalog, `abstained` says that
    it is probably not; both None without calibration.

    `cached` says that the image was not encoded for this answer. `timings_ms` has the stages that took place
    (`decode`, `queue`, `encode`, `search`) and `total`.
    """

    model: str
    bundle: str
    cached: bool
    known: float | None
    abstained: bool | None
    predictions: tuple[Prediction, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)
