"""Choose whether an entity is found by its nearest image or by the mean of its images.

The catalog's own images decide. Each is a query against a catalog in which every entity with several images lacks one:
otherwise the query's entity alone would have fewer, and the mean, which gains more from each, would look too bad.
Entities keep at least two images to be queried. Validation queries, where there are any, decide instead.

Shapes: Q queries, E entities of a part, n images of a part, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from catalog.images import ImageReader
from core.arrays import BoolArray, Float32Array, Int64Array
from export.calibrate import Validation, embed_images
from export.config import ExportConfig
from export.model import ExportModel, ImageModel
from export.precision import catalog_images
from export.shards import EntityImages
from index.embeddings import Embeddings, PooledEmbeddings, Pooling, means

_FOLDS = 4  # passes over the catalog, each without one image per entity
_MAX_QUERIES = 1024
_MIN_IMAGES = 3  # of an entity that is queried: with two, one is left and both ways are the same


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Queries that show the entities at rows `own_Q`, and which image every entity lacks. None: it lacks none."""

    queries_QD: Float32Array
    own_Q: Int64Array
    left_out: int | None = None


def pooling_folds(
    config: ExportConfig,
    model: ExportModel,
    images: Embeddings,
    sample: Sequence[EntityImages],
    validation: Validation | None,
) -> Iterator[Fold]:
    """Yield the queries that decide: validation queries, or images of the catalog.

    Without a checkpoint, stored embeddings are those of queries. With one, images of the sample are embedded again.
    """
    if validation is not None:
        known_N = validation.own_N >= 0
        yield Fold(queries_QD=validation.embeddings_ND[known_N], own_Q=validation.own_N[known_N])
    elif isinstance(model, ImageModel):
        yield from stored_folds(images)
    else:
        sampled = [entity for entity in sample if len(images.positions_of(entity[0])) >= _MIN_IMAGES]
        first = list(catalog_images(ImageReader(config.images), model.image_encoder.preprocessing, sampled))
        queries_QD = embed_images((pixels_HW3 for _, pixels_HW3 in first), config, model)
        yield Fold(queries_QD=queries_QD, own_Q=np.array([row for row, _ in first], np.int64), left_out=0)


def stored_folds(images: Embeddings) -> Iterator[Fold]:
    """Yield folds whose queries are images of the catalog, at most 1,024 in all."""
    ordinal_N, count_N = image_numbers(images.rows_N)
    usable_N = np.flatnonzero((count_N >= _MIN_IMAGES) & (ordinal_N < _FOLDS))
    if len(usable_N) > _MAX_QUERIES:
        usable_N = np.sort(np.random.default_rng(0).choice(usable_N, _MAX_QUERIES, replace=False))
    for number in range(_FOLDS):
        chosen_Q = usable_N[ordinal_N[usable_N] == number]
        if len(chosen_Q):
            yield Fold(queries_QD=images.at(chosen_Q), own_Q=images.rows_N[chosen_Q], left_out=number)


def image_numbers(rows_N: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the number of each image among those of its entity, from 0, and how many there are, both [N]."""
    _, first_E, entity_N, count_E = np.unique(rows_N, return_index=True, return_inverse=True, return_counts=True)
    return np.arange(len(rows_N)) - first_E[entity_N], count_E[entity_N]


def choose_pooling(images: Embeddings, folds: Iterable[Fold], *, default: Pooling, progress: bool = False) -> Pooling:
    """Return the way that finds more queries. `default` breaks ties. Without several images, it is "nearest"."""
    entities = PooledEmbeddings(images)
    if len(entities) == len(images):
        return "nearest"
    nearest = mean = 0
    for fold in tqdm(folds, desc="pooling", unit="pass", disable=not progress):
        right_2Q = _right(entities, fold)
        nearest, mean = nearest + int(right_2Q[0].sum()), mean + int(right_2Q[1].sum())
    if nearest == mean:
        return default
    return "mean" if mean > nearest else "nearest"


def _right(entities: PooledEmbeddings, fold: Fold) -> BoolArray:
    """Return [2, Q]: whether the entity of each query scores highest, by its nearest image and by the mean."""
    own_2Q, others_2Q = np.full((2, 2, len(fold.own_Q)), -np.inf, np.float32)
    for number in range(entities.parts):
        images_nD, starts_E = entities.images_in(number)
        rows_E = entities.rows_N[entities.starts[number] : entities.starts[number + 1]]
        if not len(rows_E):
            continue
        if fold.left_out is not None:
            count_E = np.diff(starts_E, append=len(images_nD))
            lacks_E = starts_E + fold.left_out % count_E
            kept_n = np.ones(len(images_nD), bool)
            kept_n[lacks_E[count_E > 1]] = False
            images_nD = images_nD[kept_n]
            starts_E = starts_E - np.cumsum(count_E > 1) + (count_E > 1)
        nearest_QE = np.maximum.reduceat(fold.queries_QD @ images_nD.T, starts_E, axis=1)
        mean_QE = fold.queries_QD @ means(images_nD, starts_E).astype(np.float32).T
        is_own_QE = rows_E == fold.own_Q[:, None]
        for way, scores_QE in enumerate((nearest_QE, mean_QE)):
            own_2Q[way] = np.maximum(own_2Q[way], np.where(is_own_QE, scores_QE, -np.inf).max(axis=1))
            others_2Q[way] = np.maximum(others_2Q[way], np.where(is_own_QE, -np.inf, scores_QE).max(axis=1))
    return own_2Q > others_2Q
