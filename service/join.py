"""From entity rows and cosines to predictions: selections, records, confidence.

Shapes: D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from index.calibration import CANDIDATES, Calibration, background
from index.overlay import EntityView
from index.store import Selection, StoredEntity
from service.engine import Found
from wikiclip.answers import Prediction, RecognizeOptions

SELECTIONS_KEPT = 32  # a byte an entity each


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """`known` and `abstained` are None without a calibration."""

    predictions: tuple[Prediction, ...]
    rows: tuple[int, ...]  # of their entities
    known: float | None
    abstained: bool | None


class Joiner:
    """Joins search results with the entities of the state that was searched. Safe for several threads, as those are."""

    def __init__(self, entities: EntityView, calibration: Calibration | None) -> None:
        self._store = entities
        self._calibration = calibration
        self._select = lru_cache(maxsize=SELECTIONS_KEPT)(entities.select)

    def selection(self, options: RecognizeOptions) -> Selection | None:
        """What the search may find, None for everything. It may take a second for the first who asks."""
        return self._select(tuple(sorted(set(options.types)))) if options.types else None

    def top_k(self, options: RecognizeOptions) -> int:
        """How many entities to search for: as many as are asked for, or as many as the confidence is made of."""
        return max(options.top_k, CANDIDATES if self._calibration else 1)

    def needs_unfiltered_scores(self, options: RecognizeOptions) -> bool:
        """Whether `join` needs the best scores of the whole catalog beside those that the selection allows."""
        return bool(options.types) and self._calibration is not None

    def at_hand(self, found: Found, options: RecognizeOptions) -> list[StoredEntity] | None:
        """The first entities of an answer where naming and explaining them asks no file, else None."""
        return None if options.explain else self._store.cached(found.rows[: options.top_k].tolist())

    def join(self, found: Found, options: RecognizeOptions, first: Sequence[StoredEntity] | None = None) -> Ranking:
        """The answer; `first` are its entities where they are at hand."""
        scores: list[float] = found.scores.tolist()
        background_score = background(scores if found.unfiltered_scores is None else found.unfiltered_scores.tolist())
        if first is None:
            first = self._store.by_rows(found.rows[: options.top_k].tolist())
        return self._rank(first, scores, background_score, found.embedding_D, options)

    def _rank(
        self,
        first: Sequence[StoredEntity],
        scores: Sequence[float],
        background: float,
        embedding_D: npt.NDArray[np.float32],
        options: RecognizeOptions,
    ) -> Ranking:
        """`first` of the entities that were allowed, and the `scores` of all of those. Whether to trust the answer is
        said of all, before `min_score` drops any."""
        confidences: Sequence[float | None] = [None] * len(scores)
        known: float | None = None
        if self._calibration is not None:
            sure, probably_known = self._calibration.judge(scores, background, embedding_D)
            confidences, known = [round(each, 6) for each in sure], round(probably_known, 6)
        shown = [
            (entity, score, confidence)
            for entity, score, confidence in zip(first, scores, confidences, strict=False)  # `first` are fewer
            if options.min_score is None or score >= options.min_score
        ]
        predictions = [
            Prediction(
                rank=rank,
                entity_id=entity.entity_id,
                title=title_in(entity, options.lang),
                score=round(score, 6),
                confidence=confidence,
                description=entity.description,
                url=entity.url,
                symbol=entity.symbol,
                types=entity.types,
                has_thumbnail=entity.has_thumbnail,
            )
            for rank, (entity, score, confidence) in enumerate(shown, start=1)
        ]
        abstained = None if known is None or self._calibration is None else self._calibration.abstains(known)
        rows = tuple([entity.row for entity, _, _ in shown])
        return Ranking(predictions=tuple(predictions), rows=rows, known=known, abstained=abstained)


def title_in(entity: StoredEntity, lang: str | None) -> str:
    """The title in a language where the entity has one, else its own."""
    return entity.title if lang is None else entity.titles.get(lang, entity.title)
