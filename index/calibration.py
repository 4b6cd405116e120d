"""How far to trust a score: a confidence by Platt scaling, and the confidence below which the answer is "unknown"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.errors import UserError

_MIN_OF_EACH_KIND = 5
_MAX_NEWTON_STEPS = 100
_HOW_TO_GO_ON = "give more validation queries or leave --validation out"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`confidence = sigmoid(a * score + b)`, the probability that the best prediction is right.

    Below `abstain_below` (a confidence) the answer is probably not in the catalog. `queries` and `correct` say what
    it was fitted on.
    """

    a: float
    b: float
    abstain_below: float
    queries: int
    correct: int

    def confidence(self, score: float) -> float:
        """The probability (0 to 1) that a prediction of that score (a cosine) is right."""
        return 0.5 * (1.0 + math.tanh(0.5 * (self.a * score + self.b)))  # a sigmoid that cannot overflow

    def abstains(self, score: float) -> bool:
        """Whether a best prediction of that score is probably wrong."""
        return self.confidence(score) < self.abstain_below

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        return cls(**content)


def fit_calibration(scores_N: npt.NDArray[np.floating[Any]], correct_N: npt.NDArray[np.bool_]) -> Calibration:
    """Fit a calibration to the best score of each validation query and whether that prediction was right.

    Raises `UserError` where too few are right or wrong, or where right ones do not score higher.
    """
    scores = np.asarray(scores_N, np.float64)
    correct = np.asarray(correct_N, bool)
    right, wrong = int(correct.sum()), int((~correct).sum())
    if min(right, wrong) < _MIN_OF_EACH_KIND:
        raise UserError(
            f"calibration needs at least {_MIN_OF_EACH_KIND} right and {_MIN_OF_EACH_KIND} wrong predictions, "
            f"the validation queries gave {right} and {wrong}; {_HOW_TO_GO_ON}"
        )
    a, b = _platt(scores, correct)
    if a <= 0:
        raise UserError(
            f"on the {len(scores)} validation queries right predictions score no higher than wrong ones, "
            f"so a score says nothing; check the queries' entity ids, or {_HOW_TO_GO_ON}"
        )
    fitted = Calibration(a=a, b=b, abstain_below=0.0, queries=len(scores), correct=right)
    threshold = _balanced_threshold(np.array([fitted.confidence(score) for score in scores]), correct)
    return Calibration(a=a, b=b, abstain_below=threshold, queries=len(scores), correct=right)


def _platt(scores_N: npt.NDArray[np.float64], correct_N: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Maximum likelihood by Newton's method on standardised scores, with Platt's smoothed targets.

    The smoothing keeps the optimum finite where the two kinds separate perfectly.
    """
    mean, spread = float(scores_N.mean()), float(scores_N.std())
    if spread < 1e-9:  # all scores equal: no slope to find
        return 0.0, 0.0
    x_N = (scores_N - mean) / spread
    right, wrong = correct_N.sum(), (~correct_N).sum()
    target_N = np.where(correct_N, (right + 1) / (right + 2), 1 / (wrong + 2))
    design_N2 = np.stack([x_N, np.ones_like(x_N)], axis=1)
    weights_2 = np.array([0.0, math.log((right + 1) / (wrong + 1))])
    loss = _cross_entropy(design_N2 @ weights_2, target_N)
    for _ in range(_MAX_NEWTON_STEPS):
        probability_N = 0.5 * (1.0 + np.tanh(0.5 * (design_N2 @ weights_2)))
        gradient_2 = design_N2.T @ (probability_N - target_N)
        curvature_N = probability_N * (1.0 - probability_N)
        hessian_22 = (design_N2 * curvature_N[:, None]).T @ design_N2 + 1e-9 * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        size = 1.0
        while size > 1e-6 and _cross_entropy(design_N2 @ (weights_2 - size * step_2), target_N) > loss:
            size /= 2  # far from the optimum a full step can overshoot
        weights_2 = weights_2 - size * step_2
        previous, loss = loss, _cross_entropy(design_N2 @ weights_2, target_N)
        if previous - loss < 1e-12 * max(1.0, loss):
            break
    slope, offset = float(weights_2[0]), float(weights_2[1])
    return slope / spread, offset - slope * mean / spread


def _cross_entropy(logits_N: npt.NDArray[np.float64], target_N: npt.NDArray[np.float64]) -> float:
    return float((np.logaddexp(0.0, logits_N) - target_N * logits_N).sum())


def _balanced_threshold(confidences_N: npt.NDArray[np.float64], correct_N: npt.NDArray[np.bool_]) -> float:
    """The confidence that best parts right from wrong by Youden's J, half-way between its two neighbours."""
    order = np.argsort(confidences_N, kind="stable")
    sorted_N, right_N = confidences_N[order], correct_N[order]
    # Cutting below position i answers the queries from i on: sensitivity of those minus false answers among them.
    answered_right = right_N.sum() - np.concatenate([[0], np.cumsum(right_N)])
    answered_wrong = (~right_N).sum() - np.concatenate([[0], np.cumsum(~right_N)])
    j = answered_right / right_N.sum() - answered_wrong / (~right_N).sum()
    edges = np.concatenate([[True], np.diff(sorted_N) > 0, [True]])  # equal confidences cannot be parted
    best = int(np.argmax(np.where(edges, j, -np.inf)))
    below = sorted_N[best - 1] if best > 0 else 0.0
    above = sorted_N[best] if best < len(sorted_N) else 1.0
    return float((below + above) / 2)
