"""Remembered vectors: one more reference per entity, from labelled pictures, with a handicap.

An entity has the better of two scores: that of its own embeddings, and the cosine of its remembered vector minus the
handicap. Only entities that have embeddings are remembered. `remembered/` has the format of `embeddings/`.

Shapes: B queries, K results, M remembered entities, D embedding width.
"""

from __future__ import annotations

import numpy as np

from core.arrays import BoolArray, Float32Array, Int64Array
from index.embeddings import Embeddings
from index.store import Selection
from index.top_k import best, largest


class Remembered:
    """The remembered vectors of a bundle, in memory. Thread-safe."""

    def __init__(self, vectors: Embeddings, handicap: float) -> None:
        self.rows_M = vectors.rows_N
        self.handicap = np.float32(handicap)
        self._vectors_MD = np.concatenate([np.empty((0, vectors.dim), np.float32), *vectors])

    def allowed_by(self, selection: Selection | None) -> BoolArray | None:
        """Return which remembered entities a selection allows, for `merge`. None: all."""
        return None if selection is None else selection.allowed_E[self.rows_M]

    def merge(
        self, queries_BD: Float32Array, rows_BK: Int64Array, scores_BK: Float32Array, allowed_M: BoolArray | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """Return the best K entities, given the best K by their own embeddings as `EntityIndex.search` returns them.

        This is exact: whatever is among the best by the better of two scores is among the best by one of them.
        """
        top_k = rows_BK.shape[1]
        remembered_BM, scores_BM = self.search(queries_BD, top_k, allowed_M)
        rows_BF = np.concatenate([rows_BK, remembered_BM], axis=1)
        scores_BF = np.concatenate([scores_BK, scores_BM], axis=1)
        order_BF = np.lexsort((-scores_BF, rows_BF))
        rows_BF, scores_BF = (np.take_along_axis(each, order_BF, axis=1) for each in (rows_BF, scores_BF))
        repeated_BF = np.zeros(rows_BF.shape, np.bool_)
        repeated_BF[:, 1:] = rows_BF[:, 1:] == rows_BF[:, :-1]
        rows_BF[repeated_BF], scores_BF[repeated_BF] = -1, 0
        return best(rows_BF, scores_BF, top_k)

    def search(
        self, queries_BD: Float32Array, top_k: int, allowed_M: BoolArray | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """Return the best remembered entities of L2-normalised queries and their scores, as `largest` does."""
        rows_BK, cosines_BK = largest(queries_BD @ self._vectors_MD.T, self.rows_M, top_k, allowed_M)
        return rows_BK, np.minimum(cosines_BK, np.float32(1.0)) - self.handicap

    def score(self, query_D: Float32Array, row: int) -> float:
        """Return the score of an entity's remembered vector, or minus infinity."""
        place = int(np.searchsorted(self.rows_M, row))
        if place == len(self.rows_M) or self.rows_M[place] != row:
            return -np.inf
        return float(min(1.0, self._vectors_MD[place] @ query_D) - self.handicap)
