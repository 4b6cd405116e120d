"""Why the adaptor gains little on Symbols, in three figures that need no training.

Shapes: N images of the catalog, E entities, Q queries, D embedding, L text channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from model.features import EntityKeys, FeatureStore, TrainingPair
from model.validation import ValidationSet

_BATCH = 512
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def reasons(
    store: FeatureStore,
    entities: Sequence[EntityKeys],
    drawings: Sequence[TrainingPair],
    unfamiliar: Sequence[TrainingPair],
    test: ValidationSet,
) -> dict[str, Any]:
    """Percentages: how often the nearest other drawing in the catalog is the right entity's, for training drawings, for
    those by artists that the encoder never saw (None without any), and for test drawings, none of them photographed,
    since a photograph finds its own drawing; and of the entities that test drawings are wrongly taken for, the median
    share of the catalog whose text is less like the right one's.
    """
    catalog = [(key, row) for row, entity in enumerate(entities) for key in entity.images]
    keys = [key for key, _ in catalog]
    owner_N = np.array([row for _, row in catalog], np.int64)
    images_ND = store.query_embeddings(keys)

    def found(queries: Sequence[TrainingPair]) -> float | None:
        if not queries:
            return None
        own_Q = [pair.query for pair in queries]
        nearest_Q = _nearest(store.query_embeddings(own_Q), images_ND, owner_N, own=own_Q, keys=keys)
        return 100 * float((nearest_Q == [pair.entity for pair in queries]).mean())

    nearest_Q = _nearest(test.query_embeddings_QD, images_ND, owner_N)
    wrong_Q = nearest_Q != test.entity_Q
    return {
        "training_drawings": found(drawings),
        "unfamiliar_drawings": found(unfamiliar),
        "test_drawings": 100 * float(1 - wrong_Q.mean()),
        "text_nearer_than": _text_nearer_than(_texts(store, entities), test.entity_Q[wrong_Q], nearest_Q[wrong_Q]),
    }


def _nearest(
    queries_QD: Floats, images_ND: Floats, owner_N: Ints, *, own: Sequence[bytes] = (), keys: Sequence[bytes] = ()
) -> Ints:
    """The entity of each query's nearest image, its own image left out."""
    row_of = {key: row for row, key in enumerate(keys)}
    nearest = []
    for start in range(0, len(queries_QD), _BATCH):
        cosines_BN = queries_QD[start : start + _BATCH] @ images_ND.T
        for row, key in enumerate(own[start : start + _BATCH]):
            if key in row_of:
                cosines_BN[row, row_of[key]] = -1
        nearest.append(owner_N[cosines_BN.argmax(axis=1)])
    return np.concatenate(nearest)


def _texts(store: FeatureStore, entities: Sequence[EntityKeys]) -> torch.Tensor:
    """The mean token state of each entity's text, L2-normalised, `[E, L]`; zero without text."""
    parts = []
    for start in range(0, len(entities), _BATCH):
        batch = store.batch([(None, entity.text) for entity in entities[start : start + _BATCH]], torch.device("cpu"))
        parts.append(F.normalize((batch.text_tokens_BTL * batch.text_mask_BT[:, :, None]).sum(dim=1), dim=1))
    return torch.cat(parts)


def _text_nearer_than(texts_EL: torch.Tensor, right_Q: Ints, taken_Q: Ints) -> float | None:
    """The median percentage of entities whose text is less like the right entity's than that of the one taken."""
    if not len(right_Q):
        return None
    cosines_QE = texts_EL[torch.from_numpy(right_Q)] @ texts_EL.T
    taken_Q1 = cosines_QE.gather(1, torch.from_numpy(taken_Q)[:, None])
    return 100 * float((cosines_QE < taken_Q1).float().mean(dim=1).median())
