"""Accuracy metrics. Denominators count the references: an unanswered query counts as wrong."""

from __future__ import annotations

from collections.abc import Sequence


def rank_of(entity_id: str, predicted: Sequence[str]) -> int | None:
    """Return the 1-based rank of the right entity among the predictions, or None if it is absent."""
    return predicted.index(entity_id) + 1 if entity_id in predicted else None


def recall_at_k(ranks: Sequence[int | None], k: int) -> float:
    """Return the percentage of queries whose right entity is among the first `k`, or 0 if there are no queries."""
    return 100 * sum(rank is not None and rank <= k for rank in ranks) / len(ranks) if ranks else 0.0


def harmonic_mean(seen: float, unseen: float) -> float:
    """Return OVEN's HM: the harmonic mean of the accuracies on seen and unseen entities."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
