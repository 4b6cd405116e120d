"""Accuracy figures. Denominators are the references: a query left unanswered counts as wrong."""

from __future__ import annotations

from collections.abc import Sequence


def rank_of(entity_id: str, predicted: Sequence[str]) -> int | None:
    """The 1-based rank of the right entity among the predictions, None where it is not among them."""
    return predicted.index(entity_id) + 1 if entity_id in predicted else None


def recall_at_k(ranks: Sequence[int | None], k: int) -> float:
    """The share of queries whose right entity is among the first `k`, in percent; 0 for no queries."""
    return 100 * sum(rank is not None and rank <= k for rank in ranks) / len(ranks) if ranks else 0.0


def harmonic_mean(seen: float, unseen: float) -> float:
    """OVEN's HM of the accuracies on seen and on unseen entities, shares or percentages: high only where both are."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen else 0.0
