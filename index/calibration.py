"""How far to trust an answer: the confidence of each prediction, and whether the catalog has what the image shows.

Confidences are a softmax that knows "none of these":
`P(k) = exp(slope * s_k) / (exp(none) + sum_j exp(slope * s_j))` over the best ten scores `s`, with
`none = none_offset + none_slope * (mean of s after the first)`: temperature scaling (Guo et al., ICML 2017) with one
more choice, which wins where no score stands out from what the query scores anyway. So a near twin of the best entity
and a query that is like everything both lower the confidence, and those of an answer never add up to more than 1.

Whether the entity is in the catalog is another question, since a prediction may be wrong beside it: a ridge logistic
regression on the best score, the mean of those after it, and the query's embedding. The last tells how much such a
query scores: of a blurred photograph or a strange style an encoder makes little, and then even the right entity is far.

Shapes: N queries, K the best entities of each, falling; NaN pads where there are fewer. D embedding width, C choices,
F features, M = N * C.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.errors import UserError

CANDIDATES = 10  # K

_MIN_OF_EACH_KIND = 5  # right and wrong
_MAX_NEWTON_STEPS = 100
_RIDGE = 1e-4  # keeps the optimum finite where right and wrong separate perfectly; no weight against real data
# Of features with mean 0 and deviation 1: few queries settle little. That of embeddings is times their width.
_SCORES_RIDGE, _EMBEDDING_RIDGE = 1.0, 0.1
_MOST_FITTED = 20_000  # queries, to settle some hundred weights
_HOW_TO_GO_ON = "give more validation queries or leave --validation out"

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Familiarity:
    """The probability that the catalog has the entity, where as many images show one that it has as one that it lacks:
    `sigmoid(offset + best * s_1 + background * mean(s_2..K) + direction . query)`.
    """

    offset: float
    best: float
    background: float
    direction: tuple[float, ...]

    def known(self, best: float, background: float, embedding_D: Float32Array) -> float:
        of_query = float(embedding_D @ self._weights)
        return _sigmoid(self.offset + self.best * best + self.background * background + of_query)

    @cached_property
    def _weights(self) -> Float32Array:
        return np.array(self.direction, np.float32)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The parameters of the softmax, those of being known, and the probability of that below which an answer abstains.

    `queries`, `correct` and `unknown` (queries for entities outside the catalog, those made by leaving out among them
    where the softmax was fitted to them) say what it was fitted on.
    """

    slope: float
    none_offset: float
    none_slope: float
    abstain_below: float
    queries: int
    correct: int
    unknown: int
    candidates: int = CANDIDATES
    familiarity: Familiarity | None = None  # of older bundles, and of a catalog of one entity: what "none" leaves

    def confidences(self, scores: Sequence[float], background: float) -> list[float]:
        """The probability of being right of each prediction, whose cosines are given best first.

        `background` is that of `background(...)`, over the whole catalog even where `scores` were filtered.
        """
        return self._softmax(scores, background)[0]

    def known(self, scores: Sequence[float], background: float, embedding_D: Float32Array) -> float:
        """The probability that the catalog has the entity that the query shows; 0 without any prediction."""
        return self.judge(scores, background, embedding_D)[1]

    def abstains(self, known: float) -> bool:
        """Whether the entity is probably not in the catalog, by what `known` gave."""
        return known < self.abstain_below

    def judge(self, scores: Sequence[float], background: float, embedding_D: Float32Array) -> tuple[list[float], float]:
        """`confidences` and `known` at once."""
        confidences, among_them = self._softmax(scores, background)
        if self.familiarity is None or not scores:
            return confidences, among_them
        return confidences, self.familiarity.known(scores[0], background, embedding_D)

    def _softmax(self, scores: Sequence[float], background: float) -> tuple[list[float], float]:
        """The confidences, and the probability that one of the best is right."""
        none = self.none_offset + self.none_slope * background
        logits = [self.slope * score for score in scores]
        total = _log_sum_exp([none, *logits[: self.candidates]])
        return [math.exp(min(logit - total, 0.0)) for logit in logits], 1.0 - math.exp(none - total)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Its first form had a sigmoid of the best score only, `a` and `b`, the next no
        `familiarity`."""
        if "a" in content:
            rest = {key: value for key, value in content.items() if key not in ("a", "b")}
            return cls(slope=content["a"], none_offset=-content["b"], none_slope=0.0, unknown=0, candidates=1, **rest)
        familiarity = content.get("familiarity")
        if familiarity is not None:
            familiarity = Familiarity(**{**familiarity, "direction": tuple(familiarity["direction"])})
        return cls(**{**content, "familiarity": familiarity})


def background(scores: Sequence[float]) -> float:
    """What a query scores anyway: the mean of its best cosines after the first, of the whole catalog."""
    others = list(scores[1:CANDIDATES]) or list(scores[:1])
    return sum(others) / len(others) if others else 0.0


def fit_calibration(
    scores_NK: Float64Array,
    right_NK: BoolArray,
    known_N: BoolArray,
    without_NK: Float64Array,
    embeddings_ND: Float32Array,
) -> Calibration:
    """Fit to validation queries: their best scores, which of those is the right entity's, whether the catalog has it.

    `without_NK` are the best scores with the right entity left out of the catalog. The confidences are fitted to the
    queries as they are, by maximum likelihood. Where hardly a query is answered wrong, as in a small catalog of things
    that are unlike each other, those made by leaving out are fitted to as well, and counted as unknown: how wrong
    answers score must be seen somewhere, and confidences then err on the careful side. `known` is fitted to the known
    queries and to the unknown ones, given and made by leaving out, either kind weighing the same; the threshold parts
    them as well as can be (Youden's J).

    Raises `UserError` where too few are right, or where right ones do not score higher.
    """
    right, wrong = int(right_NK[:, :1].sum()), int((~right_NK[:, :1]).sum())
    if right < _MIN_OF_EACH_KIND:
        raise UserError(
            f"calibration needs at least {_MIN_OF_EACH_KIND} right predictions, the {len(scores_NK)} validation "
            f"queries gave {right}; {_HOW_TO_GO_ON}"
        )
    unknown = int((~known_N).sum())
    left_out_NK = without_NK[known_N]
    if wrong < _MIN_OF_EACH_KIND:
        none_right_NK = np.zeros(left_out_NK.shape, bool)
        slope, none_offset, none_slope = _fit_softmax(
            np.concatenate([scores_NK, left_out_NK]), np.concatenate([right_NK, none_right_NK])
        )
        unknown += len(left_out_NK)
    else:
        slope, none_offset, none_slope = _fit_softmax(scores_NK, right_NK)
    if slope <= 1e-3:
        raise UserError(
            f"on the {len(scores_NK)} validation queries right predictions score no higher than wrong ones, "
            f"so a score says nothing; check the queries' entity ids, or {_HOW_TO_GO_ON}"
        )
    asked_NK = np.concatenate([scores_NK, left_out_NK])
    asked_ND = np.concatenate([embeddings_ND, embeddings_ND[known_N]])
    is_known_N = np.concatenate([known_N, np.zeros(len(left_out_NK), bool)])
    fitted = Calibration(
        slope=slope,
        none_offset=none_offset,
        none_slope=none_slope,
        abstain_below=0.0,
        queries=len(scores_NK),
        correct=right,
        unknown=unknown,
        familiarity=_fit_familiarity(asked_NK, asked_ND, is_known_N),
    )
    as_known_N = np.array(
        [
            fitted.known(scores, background(scores), embedding_D)
            for scores, embedding_D in zip(map(_there, asked_NK), asked_ND, strict=True)
        ]
    )
    return replace(fitted, abstain_below=_balanced_threshold(as_known_N, is_known_N))


def _there(scores_K: Float64Array) -> list[float]:
    """The scores of a query without what pads them."""
    scores: list[float] = scores_K[~np.isnan(scores_K)].tolist()
    return scores


def _backgrounds(scores_NK: Float64Array) -> Float64Array:
    return np.array([background(_there(scores_K)) for scores_K in scores_NK])


def _fit_softmax(scores_NK: Float64Array, right_NK: BoolArray) -> tuple[float, float, float]:
    """`slope`, `none_offset` and `none_slope`."""
    there_NK = ~np.isnan(scores_NK)
    queries, candidates = scores_NK.shape
    features_NC3 = np.zeros((queries, candidates + 1, 3))
    features_NC3[:, :-1, 0] = np.where(there_NK, scores_NK, 0.0)
    features_NC3[:, -1, 1] = 1.0
    features_NC3[:, -1, 2] = _backgrounds(scores_NK)
    absent_NC = np.concatenate([np.where(there_NK, 0.0, -np.inf), np.zeros((queries, 1))], axis=1)
    chosen_NC = np.concatenate([right_NK, ~right_NK.any(axis=1, keepdims=True)], axis=1).astype(np.float64)
    slope, none_offset, none_slope = _maximum_likelihood(
        features_NC3, absent_NC, chosen_NC, np.full(3, _RIDGE)
    ).tolist()
    return slope, none_offset, none_slope


def _fit_familiarity(scores_NK: Float64Array, embeddings_ND: Float32Array, known_N: BoolArray) -> Familiarity | None:
    """None where a kind is missing: a catalog of one entity has nothing left without it."""
    there_N = np.flatnonzero(~np.isnan(scores_NK[:, 0]))
    there_N = there_N[:: -(-len(there_N) // _MOST_FITTED)]
    scores_NK, known_N, embeddings_ND = scores_NK[there_N], known_N[there_N], embeddings_ND[there_N]
    if known_N.all() or not known_N.any():
        return None
    features_NF = np.column_stack([scores_NK[:, 0], _backgrounds(scores_NK), embeddings_ND.astype(np.float64)])
    mean_F, deviation_F = features_NF.mean(axis=0), np.maximum(features_NF.std(axis=0), 1e-6)
    features_NCF = np.zeros((len(known_N), 2, 1 + features_NF.shape[1]))  # the second choice, unknown, has none
    features_NCF[:, 0, 0] = 1.0
    features_NCF[:, 0, 1:] = (features_NF - mean_F) / deviation_F
    # Either kind counts half of all.
    weight_N = np.where(known_N, 0.5 / known_N.mean(), 0.5 / (~known_N).mean())
    chosen_NC = np.stack([known_N, ~known_N], axis=1) * weight_N[:, None]
    width = embeddings_ND.shape[1]
    ridge_F = np.concatenate([[_RIDGE, _SCORES_RIDGE, _SCORES_RIDGE], np.full(width, _EMBEDDING_RIDGE * width)])
    weights_F = _maximum_likelihood(features_NCF, np.zeros(chosen_NC.shape), chosen_NC, ridge_F)
    of_features_F = weights_F[1:] / deviation_F
    best, of_background, *direction = of_features_F.tolist()
    return Familiarity(
        offset=float(weights_F[0] - of_features_F @ mean_F),
        best=best,
        background=of_background,
        direction=tuple(round(each, 4) for each in direction),
    )


def _maximum_likelihood(
    features_NCF: Float64Array, absent_NC: Float64Array, chosen_NC: Float64Array, ridge_F: Float64Array
) -> Float64Array:
    """The weights `[F]` of a conditional logit model, by Newton's method on its convex loss.

    A choice's logit is its features' product with the weights, plus `absent_NC` (minus infinity: it cannot be chosen).
    `chosen_NC` has a query's weight at what was chosen, else zero.
    """
    weight_N = chosen_NC.sum(axis=1)
    features_MF = features_NCF.reshape(-1, len(ridge_F))  # of all queries and choices, for fast products

    def loss(weights_F: Float64Array) -> float:
        logits_NC = features_NCF @ weights_F + absent_NC
        of_chosen_N = (chosen_NC * np.where(chosen_NC > 0, logits_NC, 0.0)).sum(axis=1)
        total_N = weight_N * _log_sum_exp_rows(logits_NC)
        return float((total_N - of_chosen_N).sum() + 0.5 * (ridge_F * weights_F) @ weights_F)

    weights_F = np.zeros(len(ridge_F))
    before = loss(weights_F)
    for _ in range(_MAX_NEWTON_STEPS):
        logits_NC = features_NCF @ weights_F + absent_NC
        probability_NC = np.exp(logits_NC - _log_sum_exp_rows(logits_NC)[:, None]) * weight_N[:, None]
        gradient_F = (probability_NC - chosen_NC).ravel() @ features_MF + ridge_F * weights_F
        mean_NF = (probability_NC[:, None] @ features_NCF)[:, 0]
        spread_FF = (features_MF * probability_NC.reshape(-1, 1)).T @ features_MF
        spread_FF -= (mean_NF / weight_N[:, None]).T @ mean_NF
        step_F = np.linalg.solve(spread_FF + np.diag(ridge_F), gradient_F)
        size = 1.0
        while size > 1e-6 and loss(weights_F - size * step_F) > before:
            size /= 2  # far from the optimum a full step can overshoot
        weights_F = weights_F - size * step_F
        after = loss(weights_F)
        if before - after < 1e-10 * max(1.0, before):
            break
        before = after
    return weights_F


def _sigmoid(logit: float) -> float:
    power = math.exp(-abs(logit))  # of either sign it cannot overflow
    return (1.0 if logit >= 0 else power) / (1.0 + power)


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum([math.exp(value - most) for value in values]))


def _log_sum_exp_rows(values_NC: Float64Array) -> Float64Array:
    most_N1 = values_NC.max(axis=1, keepdims=True)
    total_N: Float64Array = np.log(np.exp(values_NC - most_N1).sum(axis=1)) + most_N1[:, 0]
    return total_N


def _balanced_threshold(values_N: Float64Array, positive_N: BoolArray) -> float:
    """The value that best parts two kinds by Youden's J, half-way between its two neighbours."""
    order = np.argsort(values_N, kind="stable")
    sorted_N, positive_N = values_N[order], positive_N[order]
    # Cutting below position i keeps what stands from i on: the share of positives kept minus that of the others.
    kept = positive_N.sum() - np.concatenate([[0], np.cumsum(positive_N)])
    kept_others = (~positive_N).sum() - np.concatenate([[0], np.cumsum(~positive_N)])
    j = kept / max(positive_N.sum(), 1) - kept_others / max((~positive_N).sum(), 1)
    edges = np.concatenate([[True], np.diff(sorted_N) > 0, [True]])  # equal values cannot be parted
    best = int(np.argmax(np.where(edges, j, -np.inf)))
    below = sorted_N[best - 1] if best > 0 else 0.0
    above = sorted_N[best] if best < len(sorted_N) else 1.0
    return float((below + above) / 2)
