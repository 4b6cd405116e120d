"""Which pairs are trained on: not too many of one entity, and some that the catalog itself gives."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from model.data import Pair
from model.features import EntityKeys
from model.step import TrainingPair

_STREAM = 2  # of random numbers; order and steps of training have streams 0 and 1


def at_most(pairs: Sequence[Pair], limit: int, seed: int) -> list[Pair]:
    """At most `limit` pairs of each entity, drawn at random, in the order that they came in."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, pair in enumerate(pairs):
        rows[pair.entity_id].append(row)
    rng = np.random.default_rng((seed, _STREAM))
    kept = [rng.choice(of_entity, min(limit, len(of_entity)), replace=False) for of_entity in rows.values()]
    return [pairs[row] for row in sorted(np.concatenate(kept).tolist())]


def catalog_pairs(
    entities: Sequence[EntityKeys], paired: Counter[int], max_per_entity: int | None
) -> list[TrainingPair]:
    """Pairs without labels: each image of an entity as a query for that entity.

    The entity's side is its text and another of its images, where it has one, since training never shows an entity by
    the query's own image. An entity with one image and no text gives none. `paired` counts the pairs that an entity
    (by row) has already; those of the catalog fill up to `max_per_entity`.
    """
    pairs = []
    for row, entity in enumerate(entities):
        images = list(dict.fromkeys(entity.images))
        if entity.text is None and len(images) < 2:
            continue
        room = None if max_per_entity is None else max(0, max_per_entity - paired[row])
        pairs += [TrainingPair(query=image, entity=row) for image in images[:room]]
    return pairs
