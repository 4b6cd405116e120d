"""Search over entity embeddings: the best entities of each query, an entity once, at its best image.

Shapes: B queries, K entities asked for, F candidates fetched, N embeddings, D the embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from core.errors import BundleAltered, UserError
from index.embeddings import EmbeddingShards

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_MIN_CANDIDATES = 64  # an approximate index orders by estimates: look at more than asked for, then order exactly


class EntityIndex:
    """An index over the embeddings of a bundle.

    faiss makes no promise for searches from several threads: let one thread own this object.
    """

    def __init__(self, index: Any, embeddings: EmbeddingShards, parameters: Mapping[str, Any]) -> None:
        if index.d != embeddings.dim or index.ntotal != len(embeddings):
            raise BundleAltered(
                f"the index holds {index.ntotal} embeddings of width {index.d}, the bundle {len(embeddings)} "
                f"of width {embeddings.dim}; build it again with `wikiclip index`"
            )
        self._index = index
        self._embeddings = embeddings
        self._exact = isinstance(index, faiss.IndexFlat)
        self._parameters = dict(parameters)
        self._rows_N = embeddings.rows_N
        # Where the embeddings of each entity begin: shards are written in row order, so each entity's stand together.
        self._entity_rows, self._entity_starts = np.unique(self._rows_N, return_index=True)
        self.entity_count = len(self._entity_rows)

    @classmethod
    def read(cls, path: Path, embeddings: EmbeddingShards, parameters: Mapping[str, Any]) -> EntityIndex:
        """Read an index file. Raises `BundleAltered` if it is none, or not one over these embeddings."""
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BundleAltered(f"{path} is no index ({reason}); build it again with `wikiclip index`") from error
        return cls(index, embeddings, parameters)

    def __len__(self) -> int:
        return len(self._rows_N)

    def search(
        self, query_embeddings_BD: Float32Array, top_k: int, parameters: Mapping[str, Any] | None = None
    ) -> tuple[Int64Array, Float32Array]:
        """The `top_k` best entities of each query: rows int64 [B, K] and cosines float32 [B, K], falling.

        Queries need not be normalised. Where the index gives fewer entities than asked for, row -1 with score 0 pads.
        `parameters` (`nprobe`, `efSearch`, `k_factor`) hold for this call, over those in the bundle's index
        manifest. Equal scores stand in row order.
        """
        queries_BD = np.ascontiguousarray(query_embeddings_BD, np.float32)
        queries_BD = queries_BD / np.maximum(np.linalg.norm(queries_BD, axis=1, keepdims=True), np.float32(1e-12))
        rows_BK = np.full((len(queries_BD), top_k), -1, np.int64)
        scores_BK = np.zeros((len(queries_BD), top_k), np.float32)
        wanted = min(top_k, self.entity_count)
        if wanted == 0:
            return rows_BK, scores_BK
        settings = search_parameters(self._index, {**self._parameters, **(parameters or {})})
        fetch = min(len(self), wanted if self._exact else max(wanted, _MIN_CANDIDATES))
        pending_Q = np.arange(len(queries_BD))
        while len(pending_Q):
            scores_QF, positions_QF = self._index.search(queries_BD[pending_Q], fetch, params=settings)
            short: list[int] = []
            for query, scores_F, positions_F in zip(pending_Q, scores_QF, positions_QF, strict=True):
                rows, scores = self._fold(queries_BD[query], scores_F, positions_F)
                # Several images of one entity can fill all that was fetched: fetch more, for as long as there is more.
                if len(rows) < wanted and fetch < len(self) and positions_F[-1] >= 0:
                    short.append(int(query))
                    continue
                count = min(len(rows), wanted)
                rows_BK[query, :count], scores_BK[query, :count] = rows[:count], scores[:count]
            pending_Q = np.array(short, np.int64)
            fetch = min(len(self), 2 * fetch)
        return rows_BK, scores_BK

    def _fold(
        self, query_D: Float32Array, scores_F: Float32Array, positions_F: Int64Array
    ) -> tuple[Int64Array, Float32Array]:
        """Candidates to entities: true cosines, each entity at its best one, best first."""
        found_F = positions_F >= 0
        positions_F, scores_F = positions_F[found_F], scores_F[found_F]
        if not self._exact:  # estimates, and perhaps not of the entity's best image
            positions_F = self._all_images(np.unique(self._rows_N[positions_F]))
            scores_F = self._embeddings.at(positions_F) @ query_D
        rows_F = self._rows_N[positions_F]
        order_F = np.lexsort((rows_F, -scores_F))
        rows_F, scores_F = rows_F[order_F], scores_F[order_F]
        first_F = np.sort(np.unique(rows_F, return_index=True)[1])
        return rows_F[first_F], np.minimum(scores_F[first_F], np.float32(1.0))  # rounding must not give 1.0000001

    def _all_images(self, rows_E: Int64Array) -> Int64Array:
        """The positions of all embeddings of some entities, whose rows are given in rising order."""
        at_E = np.searchsorted(self._entity_rows, rows_E)
        starts_E = self._entity_starts[at_E]
        ends_E = np.append(self._entity_starts, len(self))[at_E + 1]
        ranges = [np.arange(start, end) for start, end in zip(starts_E, ends_E, strict=True)]
        return np.concatenate(ranges) if ranges else np.empty(0, np.int64)


def search_parameters(index: Any, parameters: Mapping[str, Any]) -> Any:
    """faiss's per-call parameters for a kind of index, None where it has none. Unused ones are left out."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        inner = search_parameters(index.index, parameters)
        return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(index.base_index, parameters)
        k_factor = float(parameters.get("k_factor", 10))
        return faiss.IndexRefineSearchParameters(k_factor=k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(int(parameters.get("nprobe", 1)), index.nlist))
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=int(parameters.get("efSearch", 64)))
    return None


def factory_index(dim: int, factory: str) -> Any:
    """An empty inner-product index by faiss's factory string. Raises `UserError` where faiss cannot make it."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"faiss cannot make factory {factory!r} for width {dim} ({reason}); see faiss's guide to factory strings"
        ) from error
