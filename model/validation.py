"""What is held out of training, the top-1 accuracy on it over a whole catalog, and the effect of float16 weights.

Held-out entities stay in the catalog that is searched, but nothing is learned from their pairs.

Shapes: N entity images, Q queries, D embedding.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import harmonic_mean

import numpy as np
import torch
from torch.nn import functional as F

from core.arrays import BoolArray, Int64Array
from model.adaptor import Adaptor
from model.features import EntityKeys, FeatureStore, KeyedPair

_BATCH = 256
_HALF_SAMPLE = 256
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


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The shares, from 0 to 1, of queries whose best entity is right. None for a split without queries."""

    top1: float
    seen: float | None
    unseen: float | None
    hm: float | None

    def rank(self) -> float:
        """Return the figure that selects the best epoch: HM, or top-1 if there is only one split."""
        return self.top1 if self.hm is None else self.hm


def measure(correct_Q: BoolArray, seen_Q: Sequence[bool | None]) -> Accuracy:
    """Return the accuracy of at least one query, by split."""
    parts = [correct_Q[[split is seen for split in seen_Q]] for seen in (True, False)]
    seen, unseen = (float(part.mean()) if len(part) else None for part in parts)
    hm = None if seen is None or unseen is None else harmonic_mean((seen, unseen))
    return Accuracy(top1=float(correct_Q.mean()), seen=seen, unseen=unseen, hm=hm)


def is_better(correct_Q: BoolArray, start_Q: BoolArray, seen_Q: Sequence[bool | None]) -> bool:
    """Return whether the mean accuracy over the splits is higher than the start's by three standard errors.

    The errors are those of the paired differences. With two, one of a hundred epochs and strengths would often be
    better by chance.
    """
    difference, variance = 0.0, 0.0
    splits = [np.array([split is seen for split in seen_Q]) for seen in (True, False, None)]
    for part in (split for split in splits if split.any()):
        gain_P = correct_Q[part].astype(float) - start_Q[part]
        difference += gain_P.mean()
        variance += gain_P.var() / len(gain_P)
    return bool(difference > 3 * variance**0.5)


def right_answers(
    adaptor: Adaptor,
    store: FeatureStore,
    catalog: Sequence[EntityKeys],
    query_sets: Sequence[Sequence[KeyedPair]],
    device: torch.device,
    strengths: Sequence[float],
) -> list[list[BoolArray]]:
    """Embed every image of every entity. Return, for each strength and set, which queries find their entity first.

    The learned output is multiplied by the strength.
    """
    rows = [(image, entity.text) for entity in catalog for image in entity.images or (None,)]
    owner_N = np.repeat(np.arange(len(catalog)), [len(entity.images) or 1 for entity in catalog])
    start_ND, learned_ND = embed_parts(adaptor, store, rows, device)
    found = []
    for strength in strengths:
        embeddings_ND = F.normalize(start_ND + strength * learned_ND, dim=1)
        found.append([_search(adaptor, store, queries, embeddings_ND, owner_N) for queries in query_sets])
    return found


def _search(
    adaptor: Adaptor,
    store: FeatureStore,
    queries: Sequence[KeyedPair],
    embeddings_ND: torch.Tensor,
    owner_N: Int64Array,
) -> BoolArray:
    correct: list[bool] = []
    for start in range(0, len(queries), _BATCH):
        part = queries[start : start + _BATCH]
        embeddings_BD = torch.from_numpy(store.query_embeddings([each.query for each in part])).to(embeddings_ND.device)
        best_B = (adaptor.centred(embeddings_BD) @ embeddings_ND.T).argmax(dim=1).cpu().numpy()
        correct.extend(owner_N[best_B] == [each.entity for each in part])
    return np.array(correct)


@torch.no_grad()
def embed_parts(
    adaptor: Adaptor, store: FeatureStore, rows: Sequence[tuple[bytes | None, bytes | None]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Adaptor.parts` `[N, D]` of (image key, text key) rows, in evaluation mode. Keeps the adaptor's mode."""
    training = adaptor.training
    adaptor.eval()
    parts = [adaptor.parts(store.batch(rows[start : start + _BATCH], device)) for start in range(0, len(rows), _BATCH)]
    adaptor.train(training)
    starts, learned = zip(*parts, strict=True)
    return torch.cat(starts), torch.cat(learned)


def half_cosine(adaptor: Adaptor, store: FeatureStore, entities: Sequence[EntityKeys], device: torch.device) -> float:
    """Return the lowest cosine between embeddings by float32 and by float16 weights, over a sample of the entities.

    It is NaN if float16 overflows.
    """
    sample = entities[:: max(1, len(entities) // _HALF_SAMPLE)]
    rows = [(entity.images[0] if entity.images else None, entity.text) for entity in sample]
    halved = Adaptor(adaptor.config).to(device).eval()
    halved.load_state_dict({name: tensor.half().float() for name, tensor in adaptor.state_dict().items()})
    parts = [embed_parts(each, store, rows, device) for each in (adaptor, halved)]
    full_ND, half_ND = (F.normalize(start_ND + learned_ND, dim=1) for start_ND, learned_ND in parts)
    return (full_ND * half_ND).sum(dim=1).min().item()
