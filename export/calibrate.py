"""Fit a bundle's confidence to searched queries, and to the same queries with their own entity left out.

Shapes: N queries, M queries with their entity, with it left out, and outliers, K best entities, C = K + 1 choices,
D embedding width. Scores fall along K. NaN pads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from core.arrays import BoolArray, Float64Array
from core.errors import UserError
from export.config import ExportConfig
from export.model import ExportModel
from export.open_set import Examples, fit_open_set_model, fit_scores_model, minimise, outlier_images
from export.queries import LabelledQueries, LabelledSearch, embed_images, search_labelled
from index.calibration import CANDIDATES, Calibration, background
from index.search import EntityIndex

_MIN_RIGHT = _MIN_WRONG = 5
_RIDGE = 1e-4  # keeps the optimum finite if scores separate right from wrong; too small to matter otherwise
_CEILING, _CEILING_RIDGE = 3.0, 0.25  # the prior of its logit: mean and inverse variance
_TINY = 1e-12
_QUERIES_PER_OUTLIER, _MIN_OUTLIERS, _MAX_OUTLIERS = 10, 64, 512


class NotFitted(UserError):
    """Queries from which no calibration can be fitted."""


def calibrate(found: LabelledSearch, config: ExportConfig, model: ExportModel, index: EntityIndex) -> Calibration:
    """Fit a calibration to searched queries and to images without an entity. Raise `NotFitted`.

    Queries for entities outside the catalog count as unknown, with no right answer.
    """
    count = min(max(len(found.own_N) // _QUERIES_PER_OUTLIER, _MIN_OUTLIERS), _MAX_OUTLIERS)
    outliers_ND = embed_images(outlier_images(count, model.image_encoder.preprocessing.size_px), config, model)
    nowhere = LabelledQueries(own_N=np.full(count, -1), group_N=np.arange(count), embeddings_ND=outliers_ND)
    outliers = search_labelled(nowhere, config, index)
    return add_open_set_model(fit_softmax(found), found, outliers, progress=config.progress)


def fit_softmax(found: LabelledSearch, *, with_ceiling: bool = False) -> Calibration:
    """Fit the softmax by maximum likelihood, and the threshold by Youden's J.

    The threshold separates queries that the catalog has from those it lacks, including those with their entity left
    out. In a small catalog hardly a query is answered wrong. Then the softmax is fitted to the left-out ones too, which
    makes confidences cautious, and they count as `unknown`.

    Raise `NotFitted` if too few are right, or if right ones do not score higher.
    """
    scores_NK, right_NK, in_catalog_N = found.scores, found.right[:, :CANDIDATES], found.in_catalog
    right, wrong = int(right_NK[:, :1].sum()), int((~right_NK[:, :1]).sum())
    if right < _MIN_RIGHT:
        raise NotFitted(
            f"calibration needs at least {_MIN_RIGHT} right predictions, the {len(scores_NK)} queries gave {right}"
        )
    unknown = int((~in_catalog_N).sum())
    left_out_NK = found.scores_without[in_catalog_N]
    all_scores_NK = np.concatenate([scores_NK, left_out_NK])
    fitted_NK = scores_NK
    if wrong < _MIN_WRONG:
        fitted_NK = all_scores_NK
        right_NK = np.concatenate([right_NK, np.zeros(left_out_NK.shape, bool)])
        unknown += len(left_out_NK)
    slope, none_offset, none_slope, ceiling = _softmax_weights(fitted_NK, right_NK, with_ceiling=with_ceiling)
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
    calibration: Calibration, found: LabelledSearch, outliers: LabelledSearch, *, progress: bool = False
) -> Calibration:
    """Fit an `OpenSetModel` to the same queries and to outliers, and the threshold to the model's probabilities.

    Outliers have a tenth of the negative examples' weight. The threshold uses held-out probabilities of the queries
    only. Return `calibration` unchanged if the catalog has only one entity.
    """
    examples = _examples(found, outliers)
    if examples is None:
        return calibration
    model, probability_M = fit_open_set_model(examples, made_up=found.made_up, progress=progress)
    queries = len(probability_M) - len(outliers.own_N)
    used_N = np.flatnonzero(~np.isnan(probability_M[:queries]))
    threshold = _youden_threshold(probability_M[used_N], examples.in_catalog_N[used_N])
    return replace(calibration, open_set_model=model, abstain_below=threshold)


def fit_to_scores(found: LabelledSearch) -> Calibration:
    """Fit a calibration whose open-set model sees the scores alone, to searched queries. Raise `NotFitted`."""
    calibration, examples = fit_softmax(found, with_ceiling=True), _examples(found)
    if examples is None:
        return calibration
    model = fit_scores_model(examples)
    each_example = zip(examples.best_N.tolist(), examples.background_N.tolist(), examples.embeddings_ND, strict=True)
    probability_M = np.array([model.probability(*each) for each in each_example])
    threshold = _youden_threshold(probability_M, examples.in_catalog_N)
    return replace(calibration, open_set_model=model, abstain_below=threshold)


def _examples(found: LabelledSearch, outliers: LabelledSearch | None = None) -> Examples | None:
    """Return queries, then those of them with their entity left out, then outliers. None if no query can be left out.

    Negative examples weigh as much together as the positive ones. Outliers have a tenth of that.
    """
    in_catalog_N, without_NK = found.in_catalog, found.scores_without
    left_out_N = np.flatnonzero(in_catalog_N & ~np.isnan(without_NK[:, 0]))
    if not len(left_out_N):
        return None
    scores = [found.scores, without_NK[left_out_N]]
    embeddings = [found.embeddings_ND, found.embeddings_ND[left_out_N]]
    groups = [found.group_N, found.group_N[left_out_N]]
    queries, positive, outlier_count = len(in_catalog_N) + len(left_out_N), in_catalog_N.sum(), 0
    if outliers is not None:
        outlier_count = len(outliers.own_N)
        scores.append(outliers.scores)
        embeddings.append(outliers.embeddings_ND)
        groups.append(found.group_N.max() + 1 + np.arange(outlier_count))
    in_catalog_M = np.concatenate([in_catalog_N, np.zeros(len(left_out_N) + outlier_count, bool)])
    share = 1.0 if outliers is None else 0.9
    weight_M = np.where(in_catalog_M, 1.0, share * positive / (queries - positive))
    weight_M[queries:] = 0.1 * positive / max(outlier_count, 1)
    scores_MK = np.concatenate(scores)
    return Examples(
        best_N=scores_MK[:, 0],
        background_N=np.array([background(each) for each in _unpadded(scores_MK)]),
        embeddings_ND=np.concatenate(embeddings),
        in_catalog_N=in_catalog_M,
        group_N=np.concatenate(groups),
        weight_N=weight_M,
    )


def _unpadded(scores_NK: Float64Array) -> Iterator[list[float]]:
    return (scores_K[~np.isnan(scores_K)].tolist() for scores_K in scores_NK)


def _softmax_weights(scores_NK: Float64Array, right_NK: BoolArray, *, with_ceiling: bool) -> list[float]:
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
