"""Indexes by faiss's factory strings, and training them: the centroids of lists, the codebooks.

Shapes: S vectors to train on, L lists, D the embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.runtime import faiss
from index.embeddings import Embeddings

Float32Array = npt.NDArray[np.float32]

SEED = 1234
POINTS_PER_LIST = 40  # as many as faiss asks for
_ITERATIONS = 10
_TWO_LEVELS_FROM = 2048  # lists
_MOST_POINTS = 100_000  # where there are no lists
_IN_ITS_SOURCE = re.compile(r"^Error in .+? at \S+:\d+: (Error: )?")


def factory_index(dim: int, factory: str) -> Any:
    """An empty inner-product index by faiss's factory string. Raises `UserError` where faiss cannot make it."""
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = faiss_reason(error)
        raise UserError(
            f"faiss cannot make factory {factory!r} for width {dim} ({reason}); see faiss's guide to factory strings"
        ) from error


def faiss_reason(error: RuntimeError) -> str:
    """What faiss says is wrong, without where in its own source it is said."""
    return _IN_ITS_SOURCE.sub("", str(error).splitlines()[-1])


def gpu_count(device: str) -> int:
    """How many GPUs to train on for `auto`, `cpu` or `cuda`. Raises `UserError` where cuda cannot be had."""
    # The CPU wheel has the function, but always answers 0.
    gpus = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    if device == "cuda" and gpus == 0:
        raise UserError(
            "--device cuda: this faiss sees no GPU; install the `gpu` extra on a machine with one, or use --device cpu"
        )
    return 0 if device == "cpu" else gpus


def train(index: Any, embeddings: Embeddings, factory: str, gpus: int = 0) -> None:
    """Train an empty index on some of `embeddings`, evenly spread. Raises `UserError` where faiss cannot."""
    if index.is_trained:
        return
    core = faiss.downcast_index(index)
    lists = faiss.extract_index_ivf(index).nlist if "IVF" in factory else 0
    wanted = min(len(embeddings), max(POINTS_PER_LIST * lists, _MOST_POINTS))
    sample_SD = embeddings.at(np.linspace(0, len(embeddings), wanted, endpoint=False).astype(np.int64))
    try:
        if isinstance(core, faiss.IndexIVF):
            if len(sample_SD) < lists:
                raise RuntimeError(f"{lists} lists need as many embeddings")
            core.quantizer.train(sample_SD)
            core.quantizer.add(centroids(sample_SD, lists, gpus=gpus))
        # Codebooks of 16 entries are so soon made that threads would wait for each other, minutes on a busy machine.
        small = isinstance(core, (faiss.IndexFastScan, faiss.IndexIVFFastScan))
        with one_thread() if small else nullcontext():
            index.train(sample_SD)
    except RuntimeError as error:
        reason = faiss_reason(error)
        raise UserError(
            f"factory {factory!r} cannot be trained on {len(sample_SD)} embeddings ({reason}); take a smaller one"
        ) from error


def fill(index: Any, batches: Iterable[Float32Array]) -> None:
    """Add embeddings [n, D] to a trained index, batch by batch."""
    with exact_lists(index):
        for embeddings_nD in batches:
            index.add(embeddings_nD)


@contextmanager
def one_thread() -> Iterator[None]:
    """faiss works on one thread within the block."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


@contextmanager
def exact_lists(index: Any) -> Iterator[None]:
    """Find the lists of what is added by float32 centroids, where the index has them in float16: by BLAS, not one by
    one, which is many times quicker for many vectors and slower for a query."""
    core = faiss.try_extract_index_ivf(index)
    if core is None or not isinstance(faiss.downcast_index(core.quantizer), faiss.IndexScalarQuantizer):
        yield
        return
    own, owned = core.quantizer, core.own_fields
    exact = faiss.IndexFlatIP(core.d)
    exact.add(own.reconstruct_n(0, core.nlist))
    core.own_fields = False
    core.quantizer = exact
    try:
        yield
    finally:
        core.quantizer, core.own_fields = own, owned


def centroids(sample_SD: Float32Array, lists: int, *, gpus: int = 0) -> Float32Array:
    """Centroids [L, D] of unit length, by spherical k-means.

    Many are found in two levels, since k-means costs S x L: a few coarse clusters, then k-means within each, for as
    many centroids as its share of the vectors. A GPU does it in one.
    """
    if lists < _TWO_LEVELS_FROM or gpus:
        return _k_means(sample_SD, lists, gpus)
    coarse = round(lists**0.5)
    coarse_index = faiss.IndexFlatIP(sample_SD.shape[1])
    coarse_index.add(_k_means(sample_SD[:: max(1, len(sample_SD) // (256 * coarse))], coarse, 0))
    cluster_S = coarse_index.search(sample_SD, 1)[1][:, 0]
    sizes = np.bincount(cluster_S, minlength=coarse)
    shares = _shares(sizes, lists)
    return np.concatenate([_k_means(sample_SD[cluster_S == c], int(shares[c]), 0) for c in np.flatnonzero(sizes)])


def _shares(sizes: npt.NDArray[np.int64], lists: int) -> npt.NDArray[np.int64]:
    """`lists` shared out by size, at least one for who has any and never more than it has."""
    bounds = np.round(np.cumsum(sizes) * lists / sizes.sum()).astype(np.int64)
    shares: npt.NDArray[np.int64] = np.diff(bounds, prepend=0).clip(np.minimum(sizes, 1), sizes)
    while (excess := int(shares.sum()) - lists) != 0:
        # What rounding and the bounds cost is settled by those that have most room.
        at = np.argmax(shares if excess > 0 else sizes - shares)
        shares[at] -= np.sign(excess)
    return shares


def _k_means(sample_SD: Float32Array, count: int, gpus: int) -> Float32Array:
    if len(sample_SD) == count:
        return sample_SD
    k_means = faiss.Kmeans(
        sample_SD.shape[1], count, niter=_ITERATIONS, seed=SEED, spherical=True, gpu=gpus or False,
        min_points_per_centroid=1, max_points_per_centroid=len(sample_SD),
    )  # fmt: skip
    k_means.train(sample_SD)
    found: Float32Array = k_means.centroids
    return found
