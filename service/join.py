"""From entity rows and cosines to predictions: records, filters, confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from index.calibration import Calibration
from index.store import EntityStore, StoredEntity
from service.answers import Prediction, RecognizeOptions
from service.engine import Found

_FILTER_FETCHES_FIRST = 64
_FILTER_GROWS_BY = 4


@dataclass(frozen=True, kw_only=True)
class Ranking:
    predictions: tuple[Prediction, ...]
    abstained: bool | None


class Joiner:
    """Joins search results with the entity store. Safe for several threads, as the store is."""

    def __init__(self, store: EntityStore, calibration: Calibration | None, entity_count: int) -> None:
        self._store = store
        self._calibration = calibration
        self._entity_count = entity_count

    def first_top_k(self, options: RecognizeOptions) -> int:
        """How many entities to search for at first: with a filter more than are asked for."""
        wanted = max(options.top_k, _FILTER_FETCHES_FIRST) if options.types else options.top_k
        return max(min(wanted, self._entity_count), 1)

    def join(self, found: Found, options: RecognizeOptions, top_k: int) -> Ranking | int:
        """The predictions, or how many entities to search for instead of `top_k` because too few of those passed.

        Nothing is missed by that: it grows until enough pass or the index has no more.
        """
        rows, scores = [int(row) for row in found.rows], [float(score) for score in found.scores]
        if options.types:
            wanted_types = set(options.types)
            kept = [
                (entity, score)
                for entity, score in zip(self._store.by_rows(rows), scores, strict=True)
                if wanted_types.intersection(entity.types)
            ]
            exhausted = top_k >= self._entity_count or len(rows) < top_k
            below_min_score = options.min_score is not None and bool(scores) and scores[-1] < options.min_score
            if len(kept) < options.top_k and not exhausted and not (below_min_score and kept):
                return min(top_k * _FILTER_GROWS_BY, self._entity_count)
            kept = kept[: options.top_k]
        else:
            kept = list(zip(self._store.by_rows(rows), scores, strict=True))
        # Whether to trust the answer is said of the best entity that was allowed, before `min_score` drops any.
        abstained = self._abstained([score for _, score in kept])
        if options.min_score is not None:
            kept = [(entity, score) for entity, score in kept if score >= options.min_score]
        return Ranking(predictions=self._predictions(kept, options.lang), abstained=abstained)

    def _abstained(self, scores: Sequence[float]) -> bool | None:
        if self._calibration is None:
            return None
        return not scores or self._calibration.abstains(scores[0])

    def _predictions(self, kept: Sequence[tuple[StoredEntity, float]], lang: str | None) -> tuple[Prediction, ...]:
        with_thumbnail = self._store.rows_with_thumbnail([entity.row for entity, _ in kept])
        return tuple(
            Prediction(
                rank=rank,
                entity_id=entity.entity_id,
                title=title_in(entity, lang),
                score=round(score, 6),
                confidence=None if self._calibration is None else round(self._calibration.confidence(score), 6),
                description=entity.description,
                url=entity.url,
                symbol=entity.symbol,
                types=entity.types,
                has_thumbnail=entity.row in with_thumbnail,
            )
            for rank, (entity, score) in enumerate(kept, start=1)
        )


def title_in(entity: StoredEntity, lang: str | None) -> str:
    """The title in a language where the entity has one, else its own."""
    return entity.title if lang is None else entity.titles.get(lang, entity.title)
