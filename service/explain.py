"""Why an entity was found: where in the image its embedding matches, and what of its text the adaptor listened to.

Shapes: P patches, D embedding width (and patch width: where they differ no patch can be compared).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from index.overlay import EntityView
from index.store import StoredEntity
from service.join import Ranking
from wikiclip.answers import AttendedWord, Box, Explanation

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What of a query an explanation needs: its embedding, its patch tokens, the region of the image they cover."""

    embedding_D: Float32Array
    patch_tokens_PC: Float32Array
    region: Box


def explain(entities: EntityView, ranking: Ranking, evidence: Evidence) -> Ranking:
    """The same ranking, each prediction with its explanation. `entities` are those that were searched."""
    predictions = tuple(
        prediction.model_copy(update={"explanation": _explanation(entities, entity, evidence)})
        for prediction, entity in zip(ranking.predictions, entities.by_rows(ranking.rows), strict=True)
    )
    return replace(ranking, predictions=predictions)


def _explanation(entities: EntityView, entity: StoredEntity, evidence: Evidence) -> Explanation:
    images_ID = entities.images_of(entity.row)
    best_D = images_ID[np.argmax(images_ID @ evidence.embedding_D)]
    heat_map = match_map(evidence.patch_tokens_PC, best_D)
    return Explanation(heat_map=heat_map, region=evidence.region, words=_words(entities, entity))


def _words(entities: EntityView, entity: StoredEntity) -> tuple[AttendedWord, ...] | None:
    words = entities.attended_words(entity.row)
    if entity.text is None or not words:
        return None
    return tuple(
        AttendedWord(word=entity.text[start:end], start=start, end=end, weight=weight) for start, end, weight in words
    )


def match_map(patch_tokens_PC: Float32Array, entity_embedding_D: Float32Array) -> tuple[tuple[float, ...], ...] | None:
    """The cosine of every patch token with an entity's embedding, as rows from the top of the image.

    None where the two widths differ, or where the patches make no square.
    """
    side = math.isqrt(len(patch_tokens_PC))
    if patch_tokens_PC.shape[1] != len(entity_embedding_D) or side * side != len(patch_tokens_PC):
        return None
    lengths_P = np.maximum(np.linalg.norm(patch_tokens_PC, axis=1), np.float32(1e-12))
    cosines_P = patch_tokens_PC @ entity_embedding_D / lengths_P
    return tuple(tuple(round(float(cosine), 4) for cosine in row) for row in cosines_P.reshape(side, side))
