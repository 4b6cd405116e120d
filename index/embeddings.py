"""Entity embeddings on disk: float16 shards `embeddings/00000.npy` [n, D], and `embeddings/00000.rows.npy` int64 [n].

Shapes: N embeddings of the bundle, n of a shard, K of a selection, I of some entities, E entities, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from core.arrays import Float16Array, Float32Array, Int64Array, normalised
from core.errors import BadParameter, BundleAltered, BundleIncomplete
from core.files import atomic_write

Scalar = TypeVar("Scalar", bound=np.generic)
Pooling = Literal["nearest", "mean"]  # an entity is found by its nearest image, or by the mean of its images

_ENTITIES_AT_ONCE = 4096
_MIN_NORM = 1e-12


def vectors_file(shard: int) -> str:
    return f"{shard:05d}.npy"


def rows_file(shard: int) -> str:
    return f"{shard:05d}.rows.npy"


def write_shard(folder: Path, shard: int, rows_n: Int64Array, embeddings_nD: Float16Array | Float32Array) -> None:
    """Write a shard of L2-normalised embeddings. `rows_n` holds the entity row of each and never falls."""
    assert len(rows_n) == len(embeddings_nD), "each embedding has one row"
    for name, array in ((rows_file(shard), rows_n), (vectors_file(shard), embeddings_nD.astype(np.float16))):
        with atomic_write(folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)


def read_embedding(values: Sequence[float], dim: int) -> Float32Array:
    """Return an embedding [D], not normalised. Raises `BadParameter` if the numbers are none."""
    with np.errstate(over="ignore"):  # a number too large for float32 becomes infinite and is refused below
        embedding_D = np.array(values, np.float32)
        norm = float(np.linalg.norm(embedding_D))
    if embedding_D.shape != (dim,) or not np.isfinite(norm) or norm < _MIN_NORM:
        raise BadParameter(f"embedding must be {dim} finite numbers, not all of them 0")
    return embedding_D


class Embeddings:
    """Embeddings in parts of float16 [n, D]. Positions count through all parts.

    `rows_N` int64 holds the entity row of each position and never falls.
    """

    def __init__(self, dim: int, vectors: Sequence[Float16Array], rows: Sequence[Int64Array]) -> None:
        self.dim = dim
        self._vectors = [np.asarray(vectors_nD) for vectors_nD in vectors]  # slicing an ndarray beats slicing a memmap
        self.rows_N = np.concatenate(rows) if rows else np.empty(0, np.int64)
        self.starts = np.cumsum([0] + [len(vectors_nD) for vectors_nD in self._vectors])  # of the parts, and the end

    def __len__(self) -> int:
        return len(self.rows_N)

    def __iter__(self) -> Iterator[Float32Array]:
        """Yield the embeddings [n, D] of each part, L2-normalised again after rounding to float16."""
        return (self.part(number) for number in range(self.parts))

    @property
    def parts(self) -> int:
        return len(self._vectors)

    def part(self, number: int) -> Float32Array:
        """Return the normalised embeddings [n, D] of a part. Thread-safe."""
        return normalised(self.stored_part(number))

    def stored_part(self, number: int) -> Float16Array:
        """Return the stored vectors [n, D] of a part. Thread-safe."""
        return self._vectors[number]

    def at(self, positions_K: Int64Array) -> Float32Array:
        """Return the normalised embeddings [K, D] at those positions."""
        return normalised(self.stored(positions_K))

    def stored(self, positions_K: Int64Array) -> Float16Array:
        """Return the stored vectors [K, D] at those positions: normalised except for rounding."""
        if not len(positions_K):
            return np.empty((0, self.dim), np.float16)
        parts_K = np.searchsorted(self.starts, positions_K, side="right") - 1
        offsets_K = positions_K - self.starts[parts_K]
        if (parts_K == parts_K[0]).all():
            vectors_KD: Float16Array = self._vectors[parts_K[0]][offsets_K]
            return vectors_KD
        # A few candidates in thousands of shards: one view per row is faster than one selection per shard.
        rows = [self._vectors[part][offset] for part, offset in zip(parts_K.tolist(), offsets_K.tolist(), strict=True)]
        return np.concatenate(rows).reshape(-1, self.dim)

    def positions_of(self, row: int) -> Int64Array:
        """Return the positions [I] of an entity's embeddings."""
        return np.arange(*np.searchsorted(self.rows_N, [row, row + 1]))

    def images_of(self, row: int) -> Float32Array:
        """Return the normalised embeddings [I, D] of an entity's images. Thread-safe."""
        return self.at(self.positions_of(row))


class PooledEmbeddings(Embeddings):
    """One embedding per entity: the normalised mean of those of its images. Nothing more is stored.

    Values are those of a bundle that stores the means, in float16. An entity belongs to the part with its first image.
    """

    def __init__(self, images: Embeddings) -> None:
        self.dim = images.dim
        self._images = images
        self.rows_N, first_E = np.unique(images.rows_N, return_index=True)
        self._first_E = np.append(first_E, len(images))  # of each entity, and the end
        self.starts = np.searchsorted(first_E, images.starts)

    @property
    def parts(self) -> int:
        return self._images.parts

    def stored_part(self, number: int) -> Float16Array:
        return means(*self.images_in(number))

    def images_in(self, number: int) -> tuple[Float32Array, Int64Array]:
        """Return the normalised embeddings [n, D] of the images of a part's entities, and where each entity begins."""
        first, end = self.starts[number : number + 2]
        if first == end:
            return np.empty((0, self.dim), np.float32), np.empty(0, np.int64)
        start, next_start = self._images.starts[number : number + 2]
        own_nD = self._images.part(number)[self._first_E[first] - start :]
        rest_nD = self._images.at(np.arange(next_start, self._first_E[end]))  # of the last entity, in the next part
        return np.concatenate([own_nD, rest_nD]), self._first_E[first:end] - self._first_E[first]

    def stored(self, positions_K: Int64Array) -> Float16Array:
        blocks = [np.empty((0, self.dim), np.float16)]
        for start in range(0, len(positions_K), _ENTITIES_AT_ONCE):  # their images are many more vectors
            blocks.append(self._means_of(positions_K[start : start + _ENTITIES_AT_ONCE]))
        return np.concatenate(blocks)

    def _means_of(self, positions_K: Int64Array) -> Float16Array:
        starts_K, ends_K = self._first_E[positions_K], self._first_E[positions_K + 1]
        counts_K = ends_K - starts_K
        return means(self._images.at(concatenate_ranges(starts_K, ends_K)), np.cumsum(counts_K) - counts_K)

    def images_of(self, row: int) -> Float32Array:
        return self._images.images_of(row)


def pooled(images: Embeddings, pooling: Pooling) -> Embeddings:
    """Return what is searched: the embeddings of images, or their means."""
    return PooledEmbeddings(images) if pooling == "mean" else images


def concatenate_ranges(starts_K: Int64Array, ends_K: Int64Array) -> Int64Array:
    """Return the numbers of K ranges, one range after the other. Ends are excluded."""
    counts_K = ends_K - starts_K
    return np.arange(counts_K.sum()) + np.repeat(ends_K - np.cumsum(counts_K), counts_K)


def means(images_nD: Float32Array, starts_K: Int64Array) -> Float16Array:
    """Return the normalised means [K, D] of consecutive groups that begin at `starts_K`."""
    if not len(starts_K):
        return np.empty((0, images_nD.shape[1]), np.float16)
    return normalised(np.add.reduceat(images_nD, starts_K, axis=0)).astype(np.float16)


class EmbeddingShards(Embeddings):
    """All embeddings of a bundle, memory-mapped. Raise `BundleIncomplete` or `BundleAltered`."""

    def __init__(self, folder: Path, embedding_dim: int) -> None:
        vectors: list[Float16Array] = []
        rows: list[Int64Array] = []
        while (vectors_path := folder / vectors_file(len(rows))).exists():
            vectors_nD: Float16Array = _map(vectors_path, np.dtype(np.float16))
            rows_path = folder / rows_file(len(rows))
            rows_n: Int64Array = _map(rows_path, np.dtype(np.int64))
            if vectors_nD.ndim != 2 or vectors_nD.shape[1] != embedding_dim or rows_n.shape != vectors_nD.shape[:1]:
                raise BundleAltered(
                    f"{vectors_path} has shape {vectors_nD.shape} and {rows_path.name} {rows_n.shape}, "
                    f"expected [n, {embedding_dim}] and [n]; export the bundle again"
                )
            vectors.append(vectors_nD)
            rows.append(np.array(rows_n))
        super().__init__(embedding_dim, vectors, rows)
        self._folder = folder
        if np.any(np.diff(self.rows_N) < 0):
            raise BundleAltered(f"the embeddings in {folder} are not in row order; export the bundle again")

    def stored_part(self, number: int) -> Float16Array:
        # Not from the memory map: every page that was touched once would stay in memory.
        vectors_nD: Float16Array = np.load(self._folder / vectors_file(number), allow_pickle=False)
        return vectors_nD


def _map(path: Path, dtype: np.dtype[Scalar]) -> npt.NDArray[Scalar]:
    try:
        array: npt.NDArray[Scalar] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BundleIncomplete(f"{path} is missing; export the bundle again") from None
    except (ValueError, EOFError) as error:
        raise BundleAltered(f"{path} is not a NumPy array: {error}; export the bundle again") from error
    if array.dtype != dtype:
        raise BundleAltered(f"{path} holds {array.dtype}, expected {dtype}; export the bundle again")
    return array
