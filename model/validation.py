"""Top-1 accuracy of an adaptor over a whole catalog: seen, unseen and their harmonic mean.

Shapes: N entity embeddings, Q queries, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import harmonic_mean

import numpy as np
import numpy.typing as npt
import torch

from model.adaptor import Adaptor
from model.features import EntityKeys, FeatureStore

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares from 0 to 1 of the queries whose best entity is the right one; None for a split without queries."""

    top1: float
    seen: float | None
    unseen: float | None
    hm: float | None  # only where there are both

    def rank(self) -> float:
        """What the best checkpoint is chosen by: HM, or top-1 where the queries have one split only."""
        return self.top1 if self.hm is None else self.hm

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Queries with the entity (its row in the catalog) and the split of each."""

    query_embeddings_QD: npt.NDArray[np.float32]
    entity_Q: npt.NDArray[np.int64]
    seen_Q: Sequence[bool | None]


def measure(correct_Q: npt.NDArray[np.bool_], seen_Q: Sequence[bool | None]) -> Accuracy:
    """Accuracy by split of at least one query."""
    seen = [bool(right) for right, split in zip(correct_Q, seen_Q, strict=True) if split is True]
    unseen = [bool(right) for right, split in zip(correct_Q, seen_Q, strict=True) if split is False]
    top1_seen = sum(seen) / len(seen) if seen else None
    top1_unseen = sum(unseen) / len(unseen) if unseen else None
    hm = None if top1_seen is None or top1_unseen is None else harmonic_mean((top1_seen, top1_unseen))
    return Accuracy(top1=float(correct_Q.mean()), seen=top1_seen, unseen=top1_unseen, hm=hm)


def validate(
    adaptor: Adaptor,
    store: FeatureStore,
    catalog: Sequence[EntityKeys],
    queries: ValidationSet,
    device: torch.device,
) -> Accuracy:
    """Embed every entity once for each of its images, and find for each query the entity with the nearest of them."""
    return validate_each(adaptor, store, catalog, [queries], device)[0]


def validate_each(
    adaptor: Adaptor,
    store: FeatureStore,
    catalog: Sequence[EntityKeys],
    query_sets: Sequence[ValidationSet],
    device: torch.device,
) -> list[Accuracy]:
    """`validate` on several sets of queries, the catalog embedded once."""
    rows = [(image, entity.text) for entity in catalog for image in entity.images or (None,)]
    owner_N = np.repeat(np.arange(len(catalog)), [len(entity.images) or 1 for entity in catalog])
    embeddings_ND = embed(adaptor, store, rows, device)
    accuracies = []
    for queries in query_sets:
        correct = []
        for start in range(0, len(queries.entity_Q), _BATCH):
            part = slice(start, start + _BATCH)
            queries_BD = adaptor.centred(torch.from_numpy(queries.query_embeddings_QD[part]).to(device))
            best_B = (queries_BD @ embeddings_ND.T).argmax(dim=1).cpu().numpy()
            correct.append(owner_N[best_B] == queries.entity_Q[part])
        accuracies.append(measure(np.concatenate(correct), queries.seen_Q))
    return accuracies


@torch.no_grad()
def embed(
    adaptor: Adaptor, store: FeatureStore, rows: Sequence[tuple[bytes | None, bytes | None]], device: torch.device
) -> torch.Tensor:
    """The embeddings `[N, D]` of (image key, text key) rows, in evaluation mode; the adaptor's mode stays."""
    training = adaptor.training
    adaptor.eval()
    parts = [
        adaptor(*store.batch(rows[start : start + _BATCH], device).arguments()) for start in range(0, len(rows), _BATCH)
    ]
    adaptor.train(training)
    return torch.cat(parts)
