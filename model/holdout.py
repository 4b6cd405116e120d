"""Hold entities and queries out of training, to choose when to stop and how much of the training to keep.

Held-out entities stay in the catalog that is searched, but nothing is learned from their pairs.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.features import EntityKeys, KeyedPair

_STREAM = 3  # of random numbers; see `model.data`
_MIN_ENTITIES = 5
_MAX_ENTITIES = 2000  # held out; more would not narrow the interval by much


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """The pairs to train on and to validate on (`seen` or unseen), the catalog to search, and the held-out entities."""

    pairs: Sequence[KeyedPair]
    validation: Sequence[KeyedPair]
    entities: Sequence[EntityKeys]
    held_out: frozenset[int]


def hold_out(
    labelled: Sequence[KeyedPair],
    added: Sequence[KeyedPair],
    entities: Sequence[EntityKeys],
    *,
    share: float,
    seed: int,
) -> HoldOut | None:
    """Hold out a share of the entities, with all their pairs, and one query of each other entity that has several.

    There are at most as many held-in queries as held-out ones. Without `labelled` pairs, those `added` from the catalog
    are used, and a query that is an image of its entity is taken out of the catalog. Return None with fewer than five
    entities.
    """
    rows: dict[int, list[int]] = defaultdict(list)
    source = labelled or added
    for row, pair in enumerate(source):
        if pair.query not in entities[pair.entity].images[:1]:  # an entity keeps an image
            rows[pair.entity].append(row)
    if len(rows) < _MIN_ENTITIES or share == 0:
        return None
    rng = np.random.default_rng((seed, _STREAM))
    shuffled = rng.permutation(sorted(rows)).tolist()
    count = min(max(1, round(share * len(rows))), _MAX_ENTITIES)
    held_out = frozenset(shuffled[:count])
    unseen = [row for entity in shuffled[:count] for row in rows[entity]]
    seen = [rows[entity][rng.integers(len(rows[entity]))] for entity in shuffled[count:] if len(rows[entity]) > 1]
    seen = seen[: len(unseen)]
    validation = [replace(source[row], seen=False) for row in unseen] + [
        replace(source[row], seen=True) for row in seen
    ]
    hidden = {(pair.entity, pair.query) for pair in validation}
    return HoldOut(
        pairs=[
            pair
            for pair in (*labelled, *added)
            if pair.entity not in held_out and (pair.entity, pair.query) not in hidden
        ],
        validation=validation,
        entities=[
            replace(entity, images=tuple(image for image in entity.images if (row, image) not in hidden))
            for row, entity in enumerate(entities)
        ],
        held_out=held_out,
    )
