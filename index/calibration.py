"""How far to trust an answer: confidences by a softmax that knows "none of these", and when to say "unknown".

`P(k) = exp(slope * s_k) / (exp(none) + sum_j exp(slope * s_j))` over the best ten scores `s`, with
`none = none_offset + none_slope * (mean of s after the first)`: temperature scaling (Guo et al., ICML 2017) with one
more choice, which wins where no score stands out from what the query scores anyway. So a near twin of the best entity
and a query that is like everything both lower the confidence, and those of an answer never add up to more than 1.

Whether the catalog has the entity at all is another question, which `index.familiarity` answers.

Shapes: N queries, K the best entities of each, falling; NaN pads where there are fewer. D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from index.familiarity import Examples, Familiarity, fit_familiarity
from index.newton import minimise

CANDIDATES = 10  # K

_MIN_OF_EACH_KIND = 5  # right and wrong
_RIDGE = 1e-4  # keeps the optimum finite where right and wrong separate perfectly; no weight against real data
_HOW_TO_GO_ON = "give more validation queries or leave --validation out"

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The parameters of the softmax, and the probability of being in the catalog below which an answer abstains.

    `queries`, `correct` and `unknown` (queries for entities outside the catalog, those made by leaving out among them
    where the softmax was fitted to them) say what it was fitted on. Without a `familiarity`, as older bundles are and
    those of a catalog of one entity, what "none of these" leaves is taken for the probability of being in the catalog.
    """

    slope: float
    none_offset: float
    none_slope: float
    abstain_below: float
    queries: int
    correct: int
    unknown: int
    candidates: int = CANDIDATES
    familiarity: Familiarity | None = None

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
        """Everything but `familiarity`, which has a file of its own."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "familiarity"}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], familiarity: Familiarity | None = None) -> Self:
        """What `to_dict` gave. A first form of it had a sigmoid of the best score only: `a`, `b`."""
        if "a" in content:
            rest = {key: value for key, value in content.items() if key not in ("a", "b")}
            return cls(slope=content["a"], none_offset=-content["b"], none_slope=0.0, unknown=0, candidates=1, **rest)
        return cls(**content, familiarity=familiarity)


def background(scores: Sequence[float]) -> float:
    """What a query scores anyway: the mean of its best cosines after the first, of the whole catalog."""
    others = list(scores[1:CANDIDATES]) or list(scores[:1])
    return sum(others) / len(others) if others else 0.0


def fit_calibration(
    scores_NK: Float64Array, right_NK: BoolArray, known_N: BoolArray, without_NK: Float64Array
) -> Calibration:
    """Fit to validation queries: their best scores, which of those is the right entity's, whether the catalog has it.

    `without_NK` are the best scores with the right entity left out of the catalog. The confidences are fitted to the
    queries as they are, by maximum likelihood; the threshold parts the known ones from the unknown ones, given and
    made by leaving out, as well as can be (Youden's J). Where hardly a query is answered wrong, as in a small catalog
    of things that are unlike each other, those made by leaving out are fitted to as well, and counted as unknown: how
    wrong answers score must be seen somewhere, and confidences then err on the careful side.

    Raises `UserError` where too few are right, or where right ones do not score higher.
    """
    right, wrong = int(right_NK[:, :1].sum()), int((~right_NK[:, :1]).sum())
    if right < _MIN_OF_EACH_KIND:
        raise UserError(
            f"calibration needs at least {_MIN_OF_EACH_KIND} right predictions, the {len(scores_NK)} validation "
            f"queries gave {right}; {_HOW_TO_GO_ON}"
        )
    unknown = int((~known_N).sum())
    if wrong < _MIN_OF_EACH_KIND:
        left_out_NK = without_NK[known_N]
        none_right_NK = np.zeros(left_out_NK.shape, bool)
        slope, none_offset, none_slope = _maximum_likelihood(
            np.concatenate([scores_NK, left_out_NK]), np.concatenate([right_NK, none_right_NK])
        )
        unknown += len(left_out_NK)
    else:
        slope, none_offset, none_slope = _maximum_likelihood(scores_NK, right_NK)
    if slope <= 1e-3:
        raise UserError(
            f"on the {len(scores_NK)} validation queries right predictions score no higher than wrong ones, "
            f"so a score says nothing; check the queries' entity ids, or {_HOW_TO_GO_ON}"
        )
    fitted = Calibration(
        slope=slope,
        none_offset=none_offset,
        none_slope=none_slope,
        abstain_below=0.0,
        queries=len(scores_NK),
        correct=right,
        unknown=unknown,
    )
    asked_NK = np.concatenate([scores_NK, without_NK[known_N]])
    is_known_N = np.concatenate([known_N, np.zeros(len(asked_NK) - len(known_N), bool)])
    among_them_N = np.array([fitted._softmax(scores, background(scores))[1] for scores in map(_there, asked_NK)])
    return replace(fitted, abstain_below=_balanced_threshold(among_them_N, is_known_N))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What queries gave: their best scores and their embeddings."""

    scores_NK: Float64Array
    embeddings_ND: Float32Array


def with_familiarity(
    calibration: Calibration,
    queries: Asked,
    known_N: BoolArray,
    without_NK: Float64Array,
    group_N: IntArray,
    outliers: Asked,
    *,
    progress: bool = False,
) -> Calibration:
    """The calibration with a `familiarity` fitted to the same queries, and to images that show no entity.

    Unknown are the queries that are given as such, the known ones without the right entity (`without_NK`), both with
    nine tenths of the weight of all known ones, and `outliers` with the rest. `group_N` numbers the queries' entities.
    The threshold is taken anew: it parts known queries from unknown ones, by what fits without them say of them. Where
    nothing is left without the right entity, in a catalog of one, the calibration is returned as it was.
    """
    left_out_N = np.flatnonzero(known_N & ~np.isnan(without_NK[:, 0]))
    if not len(left_out_N):
        return calibration
    scores_MK = np.concatenate([queries.scores_NK, without_NK[left_out_N], outliers.scores_NK])
    embeddings_ND = queries.embeddings_ND
    outliers_count, of_queries = len(outliers.scores_NK), len(known_N) + len(left_out_N)
    is_known_M = np.concatenate([known_N, np.zeros(len(left_out_N) + outliers_count, bool)])
    weight_M = np.where(is_known_M, 1.0, 0.9 * known_N.sum() / (of_queries - known_N.sum()))
    weight_M[of_queries:] = 0.1 * known_N.sum() / max(outliers_count, 1)
    familiarity, probability_M = fit_familiarity(
        Examples(
            best_N=scores_MK[:, 0],
            background_N=np.array([background(scores) for scores in map(_there, scores_MK)]),
            embeddings_ND=np.concatenate([embeddings_ND, embeddings_ND[left_out_N], outliers.embeddings_ND]),
            known_N=is_known_M,
            group_N=np.concatenate([group_N, group_N[left_out_N], group_N.max() + 1 + np.arange(outliers_count)]),
            weight_N=weight_M,
        ),
        progress=progress,
    )
    judged_N = np.flatnonzero(~np.isnan(probability_M[:of_queries]))
    threshold = _balanced_threshold(probability_M[judged_N], is_known_M[judged_N])
    return replace(calibration, familiarity=familiarity, abstain_below=threshold)


def _there(scores_K: Float64Array) -> list[float]:
    """The scores of a query without what pads them."""
    scores: list[float] = scores_K[~np.isnan(scores_K)].tolist()
    return scores


def _maximum_likelihood(scores_NK: Float64Array, right_NK: BoolArray) -> tuple[float, float, float]:
    """`slope`, `none_offset` and `none_slope`: weights of three features."""
    there_NK = ~np.isnan(scores_NK)
    queries, candidates = scores_NK.shape
    features_NC3 = np.zeros((queries, candidates + 1, 3))
    features_NC3[:, :-1, 0] = np.where(there_NK, scores_NK, 0.0)
    features_NC3[:, -1, 1] = 1.0
    features_NC3[:, -1, 2] = [background(scores) for scores in map(_there, scores_NK)]
    absent_NC = np.concatenate([np.where(there_NK, 0.0, -np.inf), np.zeros((queries, 1))], axis=1)
    target_NC = np.concatenate([right_NK, ~right_NK.any(axis=1, keepdims=True)], axis=1).astype(np.float64)

    def loss(weights_3: Float64Array) -> float:
        logits_NC = features_NC3 @ weights_3 + absent_NC
        chosen_N = (np.where(target_NC > 0, logits_NC, 0.0)).sum(axis=1)
        return float((_log_sum_exp_rows(logits_NC) - chosen_N).sum() + 0.5 * _RIDGE * weights_3 @ weights_3)

    def derivatives(weights_3: Float64Array) -> tuple[Float64Array, Float64Array]:
        logits_NC = features_NC3 @ weights_3 + absent_NC
        probability_NC = np.exp(logits_NC - _log_sum_exp_rows(logits_NC)[:, None])
        gradient_3 = np.einsum("nc,ncf->f", probability_NC - target_NC, features_NC3) + _RIDGE * weights_3
        mean_N3 = np.einsum("nc,ncf->nf", probability_NC, features_NC3)
        spread_33 = np.einsum("nc,ncf,ncg->fg", probability_NC, features_NC3, features_NC3) - mean_N3.T @ mean_N3
        return gradient_3, spread_33 + _RIDGE * np.eye(3)

    slope, none_offset, none_slope = minimise(loss, derivatives, 3, tolerance=1e-10).tolist()
    return slope, none_offset, none_slope


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
