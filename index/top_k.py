"""The best entities by their scores, and the best of several result lists.

Shapes: B queries, M entities, K results, F results of several lists.
"""

from __future__ import annotations

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array


def largest(
    scores_BM: Float32Array, rows_M: Int64Array, top_k: int, allowed_M: BoolArray | None = None
) -> tuple[Int64Array, Float32Array]:
    """Return the entities with the `top_k` highest scores, in no order.

    Rows int64 and scores float32 [B, K], with fewer columns if there are fewer entities. `allowed_M` is a filter.
    """
    if allowed_M is not None:
        scores_BM, rows_M = scores_BM[:, allowed_M], rows_M[allowed_M]
    if len(rows_M) <= top_k:
        return np.broadcast_to(rows_M, scores_BM.shape), scores_BM
    best_BK = np.argpartition(-scores_BM, top_k - 1, axis=1)[:, :top_k]
    # Of equal scores the lowest rows win, which partitioning does not guarantee.
    lowest_B1 = np.take_along_axis(scores_BM, best_BK, axis=1).min(axis=1, keepdims=True)
    if np.any((scores_BM >= lowest_B1).sum(axis=1) > top_k):
        best_BK = np.argsort(-scores_BM, axis=1, kind="stable")[:, :top_k]
    return rows_M[best_BK], np.take_along_axis(scores_BM, best_BK, axis=1)


def best(rows_BF: Int64Array, scores_BF: Float32Array, top_k: int) -> tuple[Int64Array, Float32Array]:
    """Return the best `top_k` of results whose row may be -1 for none: falling scores, equal ones in row order."""
    order_BK = np.lexsort((rows_BF, np.where(rows_BF < 0, np.inf, -scores_BF)))[:, :top_k]
    return np.take_along_axis(rows_BF, order_BK, axis=1), np.take_along_axis(scores_BF, order_BK, axis=1)
