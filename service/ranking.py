"""From search results to an answer: records, confidence, abstention, explanations.

Shapes: P patches, D embedding width (also the width of patches that can be compared with entities), I images.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from core.arrays import Float32Array
from index.calibration import CANDIDATES, Calibration, background
from index.levels import Level, most_specific
from index.overlay import EntityView
from index.store import Selection, StoredEntity
from service.engine import Found
from wikiclip import answers
from wikiclip.answers import AttendedWord, Box, Explanation, Prediction, Recognition, RecognizeOptions

MAX_CACHED_SELECTIONS = 32  # one byte per entity each


def timings_ms(stages: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the time of each stage but `join`, which only counts towards the total."""
    return {name: round(1000 * (end - start), 3) for name, (start, end) in stages.items() if name != "join"}


class Ranker:
    """Turns what a search of `entities` found into an answer by `model` and the bundle `label`. Thread-safe."""

    def __init__(self, entities: EntityView, calibration: Calibration | None, model: str, label: str) -> None:
        self._entities = entities
        self._model, self._label = model, label
        self._calibration = calibration
        self._select = lru_cache(maxsize=MAX_CACHED_SELECTIONS)(entities.select)
        self._has_levels = calibration is not None and calibration.level is not None
        if self._has_levels:
            entities.store.type_levels  # noqa: B018  counted now, because the first query would wait

    def selection(self, options: RecognizeOptions) -> Selection | None:
        """Return the entities to search, None for all. The first call for some types may take a second."""
        return self._select(options.types) if options.types else None

    def top_k(self, options: RecognizeOptions) -> int:
        """Return how many entities to search for: the number requested, or the number that confidence depends on."""
        return max(options.top_k, CANDIDATES if self._calibration else 1)

    def needs_unfiltered_scores(self, options: RecognizeOptions) -> bool:
        """Return whether confidence depends on scores of entities outside the selection."""
        return bool(options.types) and self._calibration is not None

    def needs_file_access(self, found: Found, options: RecognizeOptions) -> bool:
        """Return whether `rank` has to read files, because a record is not in memory."""
        return options.explain or self._entities.cached(found.rows[: self._records(options)].tolist()) is None

    def _records(self, options: RecognizeOptions) -> int:
        """Return how many records `rank` reads: those of the predictions, and the candidates for a level."""
        return max(options.top_k, CANDIDATES if self._has_levels else 0)

    def rank(self, found: Found, options: RecognizeOptions, region: Box | None = None, views: int = 1) -> Recognition:
        """Return the answer, for patch tokens that cover `region` of the image.

        `views` is the number of images that the query combines. Confidence and abstention are judged before `min_score`
        drops predictions.
        """
        scores: list[float] = found.scores.tolist()
        records = self._entities.by_rows(found.rows[: self._records(options)].tolist())
        level: answers.Level | None = None
        confidences: Sequence[float | None] = [None] * len(scores)
        in_catalog_probability = abstained = None
        if self._calibration is not None:
            calibration = self._calibration.of_views(views)
            judged, probability = calibration.judge(scores, _background(found), found.embedding_D)
            confidences, in_catalog_probability = [round(each, 6) for each in judged], round(probability, 6)
            abstained = calibration.abstains(in_catalog_probability)
            level = self._answer_level(most_specific(self.levels(found, options, records, views)), records, options)
        # There are fewer records than scores: confidence needs more entities than are shown.
        shown = [
            (record, score, confidence)
            for record, score, confidence in zip(records[: options.top_k], scores, confidences, strict=False)
            if options.min_score is None or score >= options.min_score
        ]
        predictions = tuple(
            Prediction(
                rank=rank,
                entity_id=record.entity_id,
                title=_title(record, options),
                score=round(score, 6),
                confidence=confidence,
                description=record.description,
                url=record.url,
                symbol=record.symbol,
                types=record.types,
                has_thumbnail=record.has_thumbnail,
                explanation=self._explain(record, found, region) if options.explain else None,
            )
            for rank, (record, score, confidence) in enumerate(shown, start=1)
        )
        return Recognition(
            model=self._model,
            bundle=self._label,
            cached="encode" not in found.stages,
            timings_ms=timings_ms(found.stages),
            predictions=predictions,
            in_catalog_probability=in_catalog_probability,
            abstained=abstained,
            level=level,
        )

    def levels(
        self, found: Found, options: RecognizeOptions, records: Sequence[StoredEntity], views: int = 1
    ) -> Iterator[tuple[Level, float]]:
        """Yield the best candidate, then every type of a candidate, each with the probability that it is right.

        `records` are those of the candidates. Types that all entities of a selection have are left out. There is none
        without calibration.
        """
        model = None if self._calibration is None else self._calibration.of_views(views).level
        if model is None or not len(found.scores):
            return
        type_levels = self._entities.store.type_levels
        implied = [type_levels.types.ancestors((each,)) for each in options.types]
        known = frozenset.intersection(*implied) if implied else frozenset()
        scores = found.scores[:CANDIDATES].tolist()
        types = [type_levels.of(record.types) for record in records[: len(scores)]]
        for level, confidence in model.levels(scores, _background(found), types):
            if level.key not in known:
                yield level, confidence

    def _answer_level(
        self, chosen: tuple[Level, float] | None, records: Sequence[StoredEntity], options: RecognizeOptions
    ) -> answers.Level | None:
        if chosen is None:
            return None
        level, confidence = chosen
        if level.key is None:
            best = records[0]
            return answers.Level(
                id=best.entity_id, title=_title(best, options), kind="entity", confidence=round(confidence, 6)
            )
        title = self._entities.store.type_levels.types.title(level.key)
        return answers.Level(id=level.key, title=title, kind="type", confidence=round(confidence, 6))

    def _explain(self, record: StoredEntity, found: Found, region: Box | None) -> Explanation | None:
        """Return where the image matches the entity best and which words of its text shaped its embedding."""
        if found.patch_tokens_PC is None or region is None:
            return None
        images_ID = self._entities.images_of(record.row)
        nearest_D = images_ID[np.argmax(images_ID @ found.embedding_D)]
        words = None
        if record.text is not None:
            words = tuple(
                AttendedWord(word=record.text[start:end], start=start, end=end, weight=weight)
                for start, end, weight in self._entities.attended_words(record.row)
            )
        return Explanation(heat_map=heat_map(found.patch_tokens_PC, nearest_D), region=region, words=words or None)


def _title(record: StoredEntity, options: RecognizeOptions) -> str:
    return record.title if options.lang is None else record.titles.get(options.lang, record.title)


def _background(found: Found) -> float:
    """Return what the query scores against the whole catalog, even if the search was filtered."""
    scores = found.scores if found.unfiltered_scores is None else found.unfiltered_scores
    return background(scores.tolist())


def heat_map(patch_tokens_PC: Float32Array, entity_embedding_D: Float32Array) -> tuple[tuple[float, ...], ...] | None:
    """Return the cosine of each patch with the entity, in rows from the top of the image.

    Returns None if the widths differ or the patches do not form a square.
    """
    side = math.isqrt(len(patch_tokens_PC))
    if patch_tokens_PC.shape[1] != len(entity_embedding_D) or side * side != len(patch_tokens_PC):
        return None
    norms_P = np.maximum(np.linalg.norm(patch_tokens_PC, axis=1), np.float32(1e-12))
    cosines_P = patch_tokens_PC @ entity_embedding_D / norms_P
    return tuple(tuple(round(float(cosine), 4) for cosine in row) for row in cosines_P.reshape(side, side))
