"""Search for a catalog's own images, each left out, to choose how images are pooled and to fit confidence.

For confidence, the entity of a query is scored by its other images. An entity with a single image is queried with
changed views of it: close-ups, which only resemble other photographs. Only for exports without a checkpoint: there,
queries and entities have the same embeddings.

An entity is found by its nearest image or by the mean of its images. To choose, every entity with several images lacks
one, not only the query's: otherwise that entity alone would have fewer, and the mean, which gains more from each, would
look too bad. Entities keep at least two images to be queried. Validation queries, where there are any, decide instead.

Shapes: N queries, V images combined in each, F = K + 1 results, I other images of an entity, D embedding width; for
pooling Q queries, E entities of a part, n images of a part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from core.arrays import BoolArray, Float32Array, Float64Array, Int64Array, Pixels
from core.statistics import wilson_interval
from export.calibrate import NotFitted, calibrate
from export.config import ExportConfig
from export.model import ExportModel, ImageModel
from export.queries import LabelledQueries, LabelledSearch, catalog_images, embed_images, search_embeddings
from export.shards import EntityImages
from export.views import combine_sets, fit_views, sets_of
from imaging.preprocess import changed_view
from index.calibration import CANDIDATES, Calibration
from index.embeddings import Embeddings, PooledEmbeddings, Pooling, means
from index.manifest import ConfusedPair, SelfCheck, Share
from index.search import EntityIndex
from index.store import EntityStore

_MAX_IMAGES = 4096  # searched with themselves left out
_MAX_VIEWED = 256  # entities with a single image
_VIEWS = 2  # of each of them
# Milder views are far easier than photographs: the service would abstain from most of these (docs/experiments.md).
_VIEW_SIDES = (0.25, 0.5)
_MIN_QUERIES = 30
_PAIRS = 5

_FOLDS = 4  # passes over the catalog to choose the pooling, each without one image per entity
_MAX_POOLING_QUERIES = 1024
_MIN_IMAGES = 3  # of an entity that is queried: with two, one is left and both ways are the same


@dataclass(frozen=True, kw_only=True)
class OwnQueries:
    """Queries made from the catalog's images. `position_NV` has those of the images left out, or -1 for a view."""

    own_N: Int64Array
    position_NV: Int64Array
    embeddings_ND: Float32Array


def own_queries(
    config: ExportConfig, model: ImageModel, images: Embeddings, sample: Sequence[EntityImages]
) -> OwnQueries:
    """Return stored images of entities with several, and embed views of the sampled entities with a single one."""
    _, count_N = image_numbers(images.rows_N)
    several_N = np.flatnonzero(count_N > 1)
    if len(several_N) > _MAX_IMAGES:
        several_N = np.sort(np.random.default_rng(0).choice(several_N, _MAX_IMAGES, replace=False))
    viewed = [entity for entity in sample if len(images.positions_of(entity[0])) == 1][:_MAX_VIEWED]
    rows: list[int] = []

    def views() -> Iterator[Pixels]:
        for row, pixels_HW3 in catalog_images(config, model.image_encoder.preprocessing, viewed):
            for number in range(_VIEWS):
                rows.append(row)
                yield changed_view(pixels_HW3, (row, number), _VIEW_SIDES)

    shown = tqdm(views(), desc="views", unit="image", total=_VIEWS * len(viewed), disable=not config.progress)
    embeddings_ND = embed_images(shown, config, model)
    return OwnQueries(
        own_N=np.concatenate([images.rows_N[several_N], np.array(rows, np.int64)]),
        position_NV=np.concatenate([several_N, np.full(len(rows), -1)])[:, None],
        embeddings_ND=np.concatenate([images.at(several_N), embeddings_ND]),
    )


def search_own(
    queries: OwnQueries, config: ExportConfig, index: EntityIndex, images: Embeddings, pooling: Pooling
) -> LabelledSearch:
    """Search for queries, with the score of their own entity replaced by that of its other images."""
    rows_NF, scores_NF = search_embeddings(queries.embeddings_ND, config, index, CANDIDATES + 2)
    left_out_N = queries.position_NV[:, 0] >= 0
    hidden_NF = left_out_N[:, None] & (rows_NF == queries.own_N[:, None])
    scores_NF[hidden_NF] = np.nan
    own_scores_N = np.full(len(left_out_N), np.nan)
    for query in np.flatnonzero(left_out_N):
        position_V, own = queries.position_NV[query], int(queries.own_N[query])
        positions_I = images.positions_of(own)
        others_ID = images.at(positions_I[~np.isin(positions_I, position_V)])
        query_D = queries.embeddings_ND[query]
        own_scores_N[query] = score_of_others(query_D, images.at(position_V), others_ID, pooling)
        if index.remembered is not None:  # it has no image of the catalog
            own_scores_N[query] = max(own_scores_N[query], index.remembered.score(query_D, own))
    scores_NF = np.concatenate([scores_NF, own_scores_N[:, None]], axis=1)
    rows_NF = np.concatenate([rows_NF, queries.own_N[:, None]], axis=1)
    order_NF = np.argsort(-scores_NF, axis=1, kind="stable")[:, : CANDIDATES + 1]  # NaN is last
    scores_NF = np.take_along_axis(scores_NF, order_NF, axis=1)
    rows_NF = np.where(np.isnan(scores_NF), -1, np.take_along_axis(rows_NF, order_NF, axis=1))
    return LabelledSearch(
        own_N=queries.own_N,
        group_N=queries.own_N,
        rows_NF=rows_NF,
        scores_NF=scores_NF,
        embeddings_ND=queries.embeddings_ND,
        made_up=bool(2 * left_out_N.sum() < len(left_out_N)),
    )


def score_of_others(
    query_D: Float32Array, left_out_VD: Float32Array, others_ID: Float32Array, pooling: Pooling
) -> float:
    """Return the score of an entity by its other images.

    A mean of fewer images scores lower, so it is corrected for those left out: as if each missing image were as similar
    to the query as the others are, and as similar to the others as the images of the query are.
    """
    scores_I = others_ID.astype(np.float64) @ query_D
    if pooling == "nearest":
        return float(scores_I.max())
    count, missing, mean = len(others_ID), len(left_out_VD), float(scores_I.mean())
    to_others = float((left_out_VD.astype(np.float64) @ others_ID.T).mean())
    squared = float(np.square(others_ID.sum(axis=0, dtype=np.float64)).sum())
    squared += missing + missing * (missing - 1) * to_others + 2 * missing * count * to_others
    return float((count + missing) * mean / np.sqrt(max(squared, 1e-24)))


def check_catalog(
    queries: OwnQueries, config: ExportConfig, model: ImageModel, index: EntityIndex, images: Embeddings,
    pooling: Pooling, store: EntityStore,
) -> tuple[SelfCheck, Calibration | None]:  # fmt: skip
    """Return how well the catalog distinguishes its entities, and a calibration if one can be fitted."""
    found = search_own(queries, config, index, images, pooling)
    right_N = found.rows_NF[:, 0] == found.own_N
    calibration, reason = None, ""
    if index.entity_count < 2:
        reason = "the catalog has a single entity with an image"
    elif len(right_N) < _MIN_QUERIES:
        reason = f"the catalog's images give {len(right_N)} queries, and {_MIN_QUERIES} are needed"
    else:
        try:
            calibration = fit_views(
                calibrate(found, config, model, index),
                found,
                lambda views: search_own(own_sets(queries, views), config, index, images, pooling),
                store,
            )
        except NotFitted as error:
            reason = str(error)
    left_out_N = queries.position_NV[:, 0] >= 0
    pairs = confused_pairs(found.own_N, found.rows_NF, found.scores_NF)
    check = SelfCheck(
        left_out=_share(right_N[left_out_N]),
        views=_share(right_N[~left_out_N]),
        confused=tuple(_describe(*each, store) for each in pairs),
        no_confidence=reason,
    )
    return check, calibration


def own_sets(queries: OwnQueries, views: int) -> OwnQueries:
    """Return sets of a catalog's images of one entity, which has one image more, as queries.

    Changed views of an image are used alone only: of several, each would show the same.
    """
    several_N = np.flatnonzero(queries.position_NV[:, 0] >= 0)
    sets_SV = several_N[sets_of(queries.own_N[several_N], views, spare=1)]
    return OwnQueries(
        own_N=queries.own_N[sets_SV[:, 0]],
        position_NV=queries.position_NV[sets_SV, 0],
        embeddings_ND=combine_sets(queries.embeddings_ND, sets_SV),
    )


def _share(right_N: BoolArray) -> Share:
    right, queries = int(right_N.sum()), len(right_N)
    low, high = (round(100 * bound, 2) for bound in wilson_interval(right, queries))
    return Share(right=right, queries=queries, low=low, high=high)


def _describe(pair: tuple[int, int], errors: int, similarity: float, store: EntityStore) -> ConfusedPair:
    one, other = store.by_rows(pair)
    return ConfusedPair(
        entity_ids=(one.entity_id, other.entity_id),
        titles=(one.title, other.title),
        errors=errors,
        similarity=similarity,
    )


def confused_pairs(
    own_N: Int64Array, rows_NF: Int64Array, scores_NF: Float64Array
) -> list[tuple[tuple[int, int], int, float]]:
    """Return the pairs of entity rows with the most errors between them, their errors and their similarity.

    Of pairs with equally many errors, the most similar ones are first. A query counts for its own entity and the best
    other one. The similarity is the mean score of that one.
    """
    errors: dict[tuple[int, int], int] = defaultdict(int)
    scores: dict[tuple[int, int], list[float]] = defaultdict(list)
    for own, rows_F, scores_F in zip(own_N.tolist(), rows_NF, scores_NF, strict=True):
        others_F = np.flatnonzero((rows_F != own) & (rows_F >= 0))
        if len(others_F):
            other = int(rows_F[others_F[0]])
            pair = (min(own, other), max(own, other))
            errors[pair] += int(others_F[0] == 0)
            scores[pair].append(float(scores_F[others_F[0]]))
    similarity = {pair: round(float(np.mean(of_pair)), 4) for pair, of_pair in scores.items()}
    worst = sorted(scores, key=lambda pair: (-errors[pair], -similarity[pair], pair))[:_PAIRS]
    return [(pair, errors[pair], similarity[pair]) for pair in worst]


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
    validation: LabelledQueries | None,
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
        first = list(catalog_images(config, model.image_encoder.preprocessing, sampled))
        queries_QD = embed_images((pixels_HW3 for _, pixels_HW3 in first), config, model)
        yield Fold(queries_QD=queries_QD, own_Q=np.array([row for row, _ in first], np.int64), left_out=0)


def stored_folds(images: Embeddings) -> Iterator[Fold]:
    """Yield folds whose queries are images of the catalog, at most 1,024 in all."""
    ordinal_N, count_N = image_numbers(images.rows_N)
    usable_N = np.flatnonzero((count_N >= _MIN_IMAGES) & (ordinal_N < _FOLDS))
    if len(usable_N) > _MAX_POOLING_QUERIES:
        usable_N = np.sort(np.random.default_rng(0).choice(usable_N, _MAX_POOLING_QUERIES, replace=False))
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
