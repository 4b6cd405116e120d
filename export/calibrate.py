"""Fit a bundle's confidence to validation queries, and to the same queries with their own entity left out.

Shapes: N queries, K best entities, F = K + 1 of a search, C = K + 1 choices, B batch, D embedding width,
H = W = size_px. Scores fall along K. NaN pads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from catalog import is_url
from catalog.images import ImageReader, UnusableImage
from core.arrays import BoolArray, Float32Array, Float64Array, Int64Array, Pixels
from core.errors import BadParameter, TooLarge, UndecodableImage, UnknownEntity, UserError
from core.lines import Rejected, excerpt, read_jsonl
from export.config import ExportConfig
from export.decode import image_decoder
from export.model import ExportModel
from export.open_set import Examples, fit_open_set_model, fit_scores_model, minimise, outlier_images
from export.query_embeddings import QueryEmbeddings
from imaging import Preprocessing
from index.calibration import CANDIDATES, Calibration, background
from index.search import EntityIndex
from index.store import EntityStore
from model.data import QueryEmbedding, has_embedding

_MIN_RIGHT = _MIN_WRONG = 5
_RIDGE = 1e-4  # keeps the optimum finite if scores separate right from wrong; too small to matter otherwise
_CEILING, _CEILING_RIDGE = 3.0, 0.25  # the prior of its logit: mean and inverse variance
_TINY = 1e-12
_QUERIES_PER_OUTLIER, _MIN_OUTLIERS, _MAX_OUTLIERS = 10, 64, 512


QueryImage = Pixels | Float32Array  # the pixels [H, W, 3] of a query, or its embedding [D] if only that was kept


class NotFitted(UserError):
    """Queries from which no calibration can be fitted."""


@dataclass(frozen=True, kw_only=True)
class SearchedQueries:
    scores_NK: Float64Array
    embeddings_ND: Float32Array


@dataclass(frozen=True, kw_only=True)
class LabelledSearch:
    """What a search found for queries, and the entity that each shows.

    `own_N` holds entity rows, or -1 for entities outside the catalog. `group_N` numbers the entities. Each row of
    `rows_NF` has one entity more than a calibration uses. `made_up` queries are changed copies of the catalog's images.
    """

    own_N: Int64Array
    group_N: Int64Array
    rows_NF: Int64Array
    scores_NF: Float64Array
    embeddings_ND: Float32Array
    made_up: bool

    @property
    def scores(self) -> Float64Array:
        """The best scores `[N, K]`."""
        return self.scores_NF[:, :CANDIDATES]

    @property
    def in_catalog(self) -> BoolArray:
        """Whether the catalog has each query's entity `[N]`."""
        return self.own_N >= 0

    @property
    def right(self) -> BoolArray:
        """Which rows are the query's own entity `[N, F]`."""
        right_NF: BoolArray = (self.rows_NF == self.own_N[:, None]) & (self.rows_NF >= 0)
        return right_NF

    @property
    def scores_without(self) -> Float64Array:
        """The best scores with the query's own entity left out of the catalog `[N, K]`."""
        others = [scores_F[~right_F][:CANDIDATES] for scores_F, right_F in zip(self.scores_NF, self.right, strict=True)]
        return np.array(others, np.float64).reshape(-1, CANDIDATES)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Embedded validation queries with the row of each one's entity, or -1, and those that could not be used.

    `hashes` has the `hash_query` of each.
    """

    entity_ids: Sequence[str]
    hashes: frozenset[bytes]
    own_N: Int64Array
    embeddings_ND: Float32Array
    rejected: Sequence[Rejected]


def embed_validation(
    queries: Path, config: ExportConfig, model: ExportModel, store: EntityStore, embeddings: QueryEmbeddings
) -> Validation:
    """Read and embed validation queries. Raise `CatalogError` if the file cannot be read."""
    rejected: list[Rejected] = []
    entity_ids: list[str] = []
    hashes: set[bytes] = set()

    def images() -> Iterator[QueryImage]:
        for entity_id, image in read_queries(queries, model.image_encoder.preprocessing, rejected, embeddings):
            entity_ids.append(entity_id)
            hashes.add(hash_query(image))
            yield image

    shown = tqdm(images(), desc="validation", unit="query", disable=not config.progress)
    embeddings_ND = embed_images(shown, config, model)
    own_N = np.array([row_of(entity_id, store) for entity_id in entity_ids], np.int64)
    return Validation(
        entity_ids=entity_ids,
        hashes=frozenset(hashes),
        own_N=own_N,
        embeddings_ND=embeddings_ND,
        rejected=rejected,
    )


def calibrate_on(found: LabelledSearch, config: ExportConfig, model: ExportModel, index: EntityIndex) -> Calibration:
    """Fit a calibration to searched validation queries. Raise `UserError` if nothing can be fitted.

    Queries for entities outside the store count as unknown, with no right answer.
    """
    try:
        return calibrate(found, config, model, index)
    except NotFitted as error:
        raise UserError(f"{error}; give more validation queries, or leave --validation out") from error


def search_validation(validation: Validation, config: ExportConfig, index: EntityIndex) -> LabelledSearch:
    rows_NF, scores_NF = search_embeddings(validation.embeddings_ND, config, index)
    return LabelledSearch(
        own_N=validation.own_N,
        group_N=np.unique(validation.entity_ids, return_inverse=True)[1],
        rows_NF=rows_NF,
        scores_NF=scores_NF,
        embeddings_ND=validation.embeddings_ND,
        made_up=config.validation_made_up,
    )


def calibrate(found: LabelledSearch, config: ExportConfig, model: ExportModel, index: EntityIndex) -> Calibration:
    """Fit a calibration to searched queries and to images without an entity. Raise `NotFitted`."""
    count = min(max(len(found.own_N) // _QUERIES_PER_OUTLIER, _MIN_OUTLIERS), _MAX_OUTLIERS)
    outliers_ND = embed_images(outlier_images(count, model.image_encoder.preprocessing.size_px), config, model)
    _, scores_NF = search_embeddings(outliers_ND, config, index)
    outliers = SearchedQueries(scores_NK=scores_NF[:, :CANDIDATES], embeddings_ND=outliers_ND)
    return fit(found, outliers, progress=config.progress)


def fit(found: LabelledSearch, outliers: SearchedQueries, *, progress: bool = False) -> Calibration:
    """Fit a calibration to searched queries and searched images without an entity. Raise `NotFitted`."""
    return add_open_set_model(
        _fit_to(found),
        SearchedQueries(scores_NK=found.scores, embeddings_ND=found.embeddings_ND),
        found.in_catalog,
        found.scores_without,
        group_N=found.group_N,
        outliers=outliers,
        made_up=found.made_up,
        progress=progress,
    )


def fit_to_scores(found: LabelledSearch) -> Calibration:
    """Fit a calibration whose open-set model sees the scores alone, to searched queries. Raise `NotFitted`.

    Queries with their entity left out, and those for unknown entities, weigh as much together as the others.
    """
    calibration, without_NK = _fit_to(found, with_ceiling=True), found.scores_without
    left_out_N = np.flatnonzero(found.in_catalog & ~np.isnan(without_NK[:, 0]))
    if not len(left_out_N):
        return calibration
    scores_MK = np.concatenate([found.scores, without_NK[left_out_N]])
    in_catalog_M = np.concatenate([found.in_catalog, np.zeros(len(left_out_N), bool)])
    best_M, background_M = scores_MK[:, 0], np.array([background(scores) for scores in _unpadded(scores_MK)])
    embeddings_MD = np.concatenate([found.embeddings_ND, found.embeddings_ND[left_out_N]])
    model = fit_scores_model(
        Examples(
            best_N=best_M,
            background_N=background_M,
            embeddings_ND=embeddings_MD,
            in_catalog_N=in_catalog_M,
            group_N=np.concatenate([found.group_N, found.group_N[left_out_N]]),
            weight_N=np.where(in_catalog_M, 1.0, in_catalog_M.sum() / (~in_catalog_M).sum()),
        )
    )
    examples = zip(best_M.tolist(), background_M.tolist(), embeddings_MD, strict=True)
    probability_M = np.array([model.probability(*each) for each in examples])
    return replace(calibration, open_set_model=model, abstain_below=_youden_threshold(probability_M, in_catalog_M))


def _fit_to(found: LabelledSearch, *, with_ceiling: bool = False) -> Calibration:
    right_NK = found.right[:, :CANDIDATES]
    return fit_calibration(found.scores, right_NK, found.in_catalog, found.scores_without, with_ceiling=with_ceiling)


def fit_calibration(
    scores_NK: Float64Array,
    right_NK: BoolArray,
    in_catalog_N: BoolArray,
    without_NK: Float64Array,
    *,
    with_ceiling: bool = False,
) -> Calibration:
    """Fit the softmax by maximum likelihood, and the threshold by Youden's J.

    `right_NK` marks the right entity, `without_NK` holds the best scores with that entity left out of the catalog. The
    threshold separates queries that the catalog has from those it lacks, including those with their entity left out.
    In a small catalog hardly a query is answered wrong. Then the softmax is fitted to the left-out ones too, which
    makes confidences cautious, and they count as `unknown`.

    Raise `NotFitted` if too few are right, or if right ones do not score higher.
    """
    right, wrong = int(right_NK[:, :1].sum()), int((~right_NK[:, :1]).sum())
    if right < _MIN_RIGHT:
        raise NotFitted(
            f"calibration needs at least {_MIN_RIGHT} right predictions, the {len(scores_NK)} queries gave {right}"
        )
    unknown = int((~in_catalog_N).sum())
    left_out_NK = without_NK[in_catalog_N]
    all_scores_NK = np.concatenate([scores_NK, left_out_NK])
    if wrong < _MIN_WRONG:
        right_NK = np.concatenate([right_NK, np.zeros(left_out_NK.shape, bool)])
        slope, none_offset, none_slope, ceiling = _fit_softmax(all_scores_NK, right_NK, with_ceiling=with_ceiling)
        unknown += len(left_out_NK)
    else:
        slope, none_offset, none_slope, ceiling = _fit_softmax(scores_NK, right_NK, with_ceiling=with_ceiling)
    if slope <= 1e-3:
        raise NotFitted(
            f"on the {len(scores_NK)} queries right predictions score no higher than wrong ones, so scores carry no "
            "information"
        )
    fitted = Calibration(
        slope=slope,
        none_offset=none_offset,
        none_slope=none_slope,
        ceiling=ceiling,
        abstain_below=0.0,
        queries=len(scores_NK),
        correct=right,
        unknown=unknown,
    )
    all_in_catalog_N = np.concatenate([in_catalog_N, np.zeros(len(left_out_NK), bool)])
    nothing_D = np.zeros(0, np.float32)
    probability_N = np.array(
        [fitted.judge(scores, background(scores), nothing_D)[1] for scores in _unpadded(all_scores_NK)]
    )
    return replace(fitted, abstain_below=_youden_threshold(probability_N, all_in_catalog_N))


def add_open_set_model(
    calibration: Calibration,
    queries: SearchedQueries,
    in_catalog_N: BoolArray,
    without_NK: Float64Array,
    group_N: Int64Array,
    outliers: SearchedQueries,
    *,
    made_up: bool = False,
    progress: bool = False,
) -> Calibration:
    """Fit an `OpenSetModel` to the same queries and to outliers, and the threshold to the model's probabilities.

    Negative examples have the weight of the positive ones: nine tenths for unknown queries and those with their entity
    left out, one tenth for outliers. The threshold uses held-out probabilities of the queries only. `group_N` numbers
    the queries' entities. Return `calibration` unchanged if the catalog has only one entity.
    """
    left_out_N = np.flatnonzero(in_catalog_N & ~np.isnan(without_NK[:, 0]))
    if not len(left_out_N):
        return calibration
    scores_MK = np.concatenate([queries.scores_NK, without_NK[left_out_N], outliers.scores_NK])
    embeddings_ND = queries.embeddings_ND
    outlier_count, query_count = len(outliers.scores_NK), len(in_catalog_N) + len(left_out_N)
    in_catalog_M = np.concatenate([in_catalog_N, np.zeros(len(left_out_N) + outlier_count, bool)])
    weight_M = np.where(in_catalog_M, 1.0, 0.9 * in_catalog_N.sum() / (query_count - in_catalog_N.sum()))
    weight_M[query_count:] = 0.1 * in_catalog_N.sum() / max(outlier_count, 1)
    model, probability_M = fit_open_set_model(
        Examples(
            best_N=scores_MK[:, 0],
            background_N=np.array([background(scores) for scores in _unpadded(scores_MK)]),
            embeddings_ND=np.concatenate([embeddings_ND, embeddings_ND[left_out_N], outliers.embeddings_ND]),
            in_catalog_N=in_catalog_M,
            group_N=np.concatenate([group_N, group_N[left_out_N], group_N.max() + 1 + np.arange(outlier_count)]),
            weight_N=weight_M,
        ),
        made_up=made_up,
        progress=progress,
    )
    used_N = np.flatnonzero(~np.isnan(probability_M[:query_count]))
    threshold = _youden_threshold(probability_M[used_N], in_catalog_M[used_N])
    return replace(calibration, open_set_model=model, abstain_below=threshold)


def embed_images(images: Iterable[QueryImage], config: ExportConfig, model: ExportModel) -> Float32Array:
    """Return the query embeddings [N, D] of images."""
    embeddings = [np.zeros((0, model.image_encoder.embedding_dim), np.float32)]
    remaining = iter(images)
    while batch := list(islice(remaining, config.batch_size)):
        pixels = [each for each in batch if each.dtype == np.uint8]
        embedded = iter(model.embed_queries(np.stack(pixels)) if pixels else ())
        embeddings.append(np.stack([next(embedded) if each.dtype == np.uint8 else each for each in batch]))
    return np.concatenate(embeddings)


def search_embeddings(
    embeddings_ND: Float32Array, config: ExportConfig, index: EntityIndex, count: int = CANDIDATES + 1
) -> tuple[Int64Array, Float64Array]:
    """Return the best `count` rows and scores [N, F] of queries, padded with row -1 and NaN."""
    rows = [np.zeros((0, count), np.int64)]
    scores = [np.zeros((0, count))]
    for start in range(0, len(embeddings_ND), config.batch_size):
        rows_BF, scores_BF = index.search(embeddings_ND[start : start + config.batch_size], count)
        rows.append(rows_BF)
        scores.append(np.where(rows_BF < 0, np.nan, scores_BF.astype(np.float64)))
    return np.concatenate(rows), np.concatenate(scores)


def _unpadded(scores_NK: Float64Array) -> Iterator[list[float]]:
    return (scores_K[~np.isnan(scores_K)].tolist() for scores_K in scores_NK)


def _fit_softmax(scores_NK: Float64Array, right_NK: BoolArray, *, with_ceiling: bool) -> list[float]:
    """Return `slope`, `none_offset`, `none_slope` and `ceiling`.

    The likelihood is that of which candidate is right. With a ceiling, it is that of whether the best one is: otherwise
    the lower candidates decide how sure the fit is of the best (docs/experiments.md).
    """
    queries, candidates = scores_NK.shape
    present_NK = torch.from_numpy(~np.isnan(scores_NK))
    scores = torch.from_numpy(np.nan_to_num(scores_NK))
    background_N = torch.tensor([background(each) for each in _unpadded(scores_NK)], dtype=torch.float64)
    target_N = torch.from_numpy(np.where(right_NK.any(axis=1), right_NK.argmax(axis=1), candidates))

    def logits(slope: Tensor, none_offset: Tensor, none_slope: Tensor) -> Tensor:
        logits_NK = torch.where(present_NK, slope * scores, -torch.inf)
        return torch.cat([logits_NK, (none_offset + none_slope * background_N)[:, None]], dim=1)

    def loss(weights_3: Tensor) -> Tensor:
        of_which = cross_entropy(logits(*weights_3), target_N, reduction="sum")
        return of_which + 0.5 * _RIDGE * weights_3.square().sum()

    def loss_with_ceiling(weights_4: Tensor) -> Tensor:
        best_N = torch.sigmoid(_CEILING + weights_4[3]) * logits(*weights_4[:3]).softmax(dim=1)[:, 0]
        likelihood_N = torch.where(target_N == 0, best_N, 1 - best_N).clamp(min=_TINY)
        penalty = _RIDGE * weights_4[:3].square().sum() + _CEILING_RIDGE * weights_4[3].square()
        return 0.5 * penalty - likelihood_N.log().sum()

    scale_F = torch.full((4 if with_ceiling else 3,), queries**-0.5, dtype=torch.float64)
    weights = minimise(loss_with_ceiling if with_ceiling else loss, scale_F=scale_F).tolist()
    return [*weights[:3], 1 / (1 + math.exp(-_CEILING - weights[3])) if with_ceiling else 1.0]


def _youden_threshold(values_N: Float64Array, positive_N: BoolArray) -> float:
    """Return the cut that maximises Youden's J, midway between the two values around it."""
    order = np.argsort(values_N, kind="stable")
    sorted_N, positive_N = values_N[order], positive_N[order]
    # A cut below position i accepts everything from i on.
    accepted = positive_N.sum() - np.concatenate([[0], np.cumsum(positive_N)])
    wrongly_accepted = (~positive_N).sum() - np.concatenate([[0], np.cumsum(~positive_N)])
    j = accepted / max(positive_N.sum(), 1) - wrongly_accepted / max((~positive_N).sum(), 1)
    possible = np.concatenate([[True], np.diff(sorted_N) > 0, [True]])  # no cut separates equal values
    best = int(np.argmax(np.where(possible, j, -np.inf)))
    below = sorted_N[best - 1] if best > 0 else 0.0
    above = sorted_N[best] if best < len(sorted_N) else 1.0
    return float((below + above) / 2)


def hash_query(image: QueryImage) -> bytes:
    """Return a hash that equal images have in common, whatever their files."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def row_of(entity_id: str, store: EntityStore) -> int:
    """Return the entity's row, or -1."""
    try:
        return store.get(entity_id).row
    except UnknownEntity:
        return -1


def read_queries(
    path: Path, preprocessing: Preprocessing, rejected: list[Rejected], embeddings: QueryEmbeddings | None = None
) -> Iterator[tuple[str, QueryImage]]:
    """Yield the right entity of each query and its pixels [H, W, 3], or its embedding [D] if there are `embeddings`.

    Add those that cannot be used to `rejected`.
    """
    for item in read_jsonl(path):
        if isinstance(item, Rejected):
            rejected.append(Rejected(line=item.line, reason=f"{path.name}: {item.reason}", record=item.record))
            continue
        line, row = item
        image, entity_id = row.get("image"), row.get("entity_id")
        query: QueryImage
        try:
            if embeddings is not None and has_embedding(row) and isinstance(entity_id, str):
                query = embeddings.read(QueryEmbedding.of(row))
            elif isinstance(image, str) and isinstance(entity_id, str):
                data = ImageReader().read(image if is_url(image) else str(path.parent / image))
                query = image_decoder().load_pixels(data, preprocessing)
            else:
                raise UnusableImage("`image` and `entity_id` must be strings")
        except (UnusableImage, UndecodableImage, TooLarge, BadParameter) as error:
            rejected.append(Rejected(line=line, reason=f"{path.name}: {error}", record=excerpt(row)))
            continue
        yield entity_id, query
