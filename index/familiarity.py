"""Whether the catalog has what a query shows, judged by how much it scores and by what it is.

The best score alone does not tell: of a blurred photograph or a strange style an encoder makes little, and then even
the right entity is far, while an image that shows nothing can be close to many. So a logistic regression on the best
score `s` and the mean of those after it also sees the query embedding `q`, by its nearness to landmarks `c_l`, some of
the embeddings that it was fitted to:

    logit = offset + best * s + background * mean + sum_l exp((q . c_l - 1) / width) * (level_l + slope_l * s)

The last sum is a Gaussian process on the sphere, in the approximation by landmarks of Williams and Seeger (Using the
Nyström method to speed up kernel machines, NeurIPS 2000). Among what it is fitted to as unknown are images of nothing
and of no thing in particular (outlier exposure: Hendrycks et al., ICLR 2019), since what no validation query is like
would be judged by extrapolation.

Shapes: N examples, L landmarks, D embedding width, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from core.files import atomic_write
from index.newton import minimise

_LANDMARKS = 768
_MOST_EXAMPLES = 24_000
_LEAST_EXAMPLES = 200  # of fewer, nothing about embeddings can be learned
_FOLDS = 3
_SCORES_RIDGE = 1.0  # of features with mean 0 and deviation 1
_EMBEDDING_RIDGES = (0.1, 1.0, 10.0, 100.0)  # of a kernel with 1 on its diagonal
_LEAST_EIGENVALUE = 1e-4  # of the largest
_SEED = 7

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What to fit to. Examples of a group are alike, as photographs of one drawing are: they are held out together."""

    best_N: Float64Array
    background_N: Float64Array
    embeddings_ND: Float32Array
    known_N: BoolArray
    group_N: IntArray
    weight_N: Float64Array

    @property
    def scores(self) -> Float64Array:
        """Both figures of them, `[N, 2]`."""
        return np.column_stack([self.best_N, self.background_N])

    def take(self, chosen_N: IntArray | BoolArray) -> Examples:
        return Examples(**{name: values[chosen_N] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Familiarity:
    """The probability that the catalog has the entity, where as many queries show one that it has as one it lacks."""

    offset: float
    best: float
    background: float
    width: float
    landmarks_LD: Float32Array
    level_L: Float64Array
    slope_L: Float64Array

    def known(self, best: float, background: float, embedding_D: Float32Array) -> float:
        nearness_L = np.exp((self.landmarks_LD @ embedding_D - 1.0) / self.width)
        of_query = float(nearness_L @ self.level_L) + best * float(nearness_L @ self.slope_L)
        return _sigmoid(self.offset + self.best * best + self.background * background + of_query)

    def write(self, path: Path) -> None:
        """Write as numpy's `.npz`: the same bytes for the same content."""
        scalars = np.array([self.offset, self.best, self.background, self.width])
        weights_2L = np.stack([self.level_L, self.slope_L])
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, scalars=scalars, landmarks=self.landmarks_LD.astype(np.float16), weights=weights_2L)

    @classmethod
    def read(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as content:
            offset, best, background, width = content["scalars"].tolist()
            level_L, slope_L = content["weights"]
            return cls(
                offset=offset,
                best=best,
                background=background,
                width=width,
                landmarks_LD=content["landmarks"].astype(np.float32),
                level_L=level_L,
                slope_L=slope_L,
            )


def fit_familiarity(examples: Examples, *, progress: bool = False) -> tuple[Familiarity, Float64Array]:
    """Fit by penalised maximum likelihood, the penalty of embeddings chosen by cross-validation over the groups.

    Returns the probabilities `[N]` of being known, too, that each example was given by a fit without its group: what a
    threshold can be taken from. Of more than 24,000 examples some, drawn evenly, are not looked at; they have NaN.
    """
    of_all = len(examples.known_N)
    rng = np.random.default_rng(_SEED)
    fitted_N = np.sort(rng.permutation(of_all)[:_MOST_EXAMPLES])
    examples = examples.take(fitted_N)
    features = _Features.of(examples, rng)
    features_NF, known_N, weight_N = features(examples), examples.known_N, examples.weight_N
    group_G, place_N = np.unique(examples.group_N, return_inverse=True)
    fold_N = rng.permutation(len(group_G))[place_N] % _FOLDS
    learnable = len(known_N) >= _LEAST_EXAMPLES and len(group_G) >= _FOLDS
    best_loss, ridge, held_out_N = math.inf, math.inf, np.zeros(0)
    candidates = _EMBEDDING_RIDGES if learnable else _EMBEDDING_RIDGES[-1:]
    for candidate in tqdm(candidates, desc="known", unit="fit", disable=not progress):
        ridge_F = features.ridge(candidate)
        logit_N = np.empty(len(fold_N))
        for fold in range(_FOLDS):
            out_N = fold_N == fold
            weights_F = _logistic(features_NF[~out_N], known_N[~out_N], weight_N[~out_N], ridge_F)
            logit_N[out_N] = features_NF[out_N] @ weights_F
        loss = _log_loss(logit_N, known_N, weight_N)
        if loss < best_loss:
            best_loss, ridge, held_out_N = loss, candidate, logit_N
    weights_F = _logistic(features_NF, known_N, weight_N, features.ridge(ridge))
    probability_N = np.full(of_all, np.nan)
    probability_N[fitted_N] = _probability(held_out_N)
    return features.folded(weights_F), probability_N


@dataclass(frozen=True, kw_only=True)
class _Features:
    """One, the figures of the scores, standardised, nearness in a basis that whitens it, and that times the best."""

    landmarks_LD: Float32Array
    width: float
    basis_LB: Float64Array
    mean_2: Float64Array
    deviation_2: Float64Array

    @classmethod
    def of(cls, examples: Examples, rng: np.random.Generator) -> _Features:
        distinct_ND = np.unique(examples.embeddings_ND, axis=0)
        landmarks_LD = distinct_ND[rng.permutation(len(distinct_ND))[:_LANDMARKS]]
        landmarks_LD = landmarks_LD.astype(np.float16).astype(np.float32)  # as they are kept
        cosine_LL = landmarks_LD.astype(np.float64) @ landmarks_LD.T
        width = 1.5 * max(float((1.0 - cosine_LL).mean()), 1e-3)
        values_L, vectors_LL = np.linalg.eigh(np.exp((cosine_LL - 1.0) / width))
        kept_L = values_L > _LEAST_EIGENVALUE * values_L.max()
        scores_N2 = examples.scores
        return cls(
            landmarks_LD=landmarks_LD,
            width=width,
            basis_LB=vectors_LL[:, kept_L] / np.sqrt(values_L[kept_L]),
            mean_2=scores_N2.mean(axis=0),
            deviation_2=np.maximum(scores_N2.std(axis=0), 1e-6),
        )

    def __call__(self, examples: Examples) -> Float64Array:
        standard_N2 = (examples.scores - self.mean_2) / self.deviation_2
        cosine_NL = (examples.embeddings_ND @ self.landmarks_LD.T).astype(np.float64)
        near_NB = np.exp((cosine_NL - 1.0) / self.width) @ self.basis_LB
        one_N1 = np.ones((len(near_NB), 1))
        return np.concatenate([one_N1, standard_N2, near_NB, 0.5 * standard_N2[:, :1] * near_NB], axis=1)

    def ridge(self, of_embedding: float) -> Float64Array:
        of_scores = [1e-4, _SCORES_RIDGE, _SCORES_RIDGE]
        return np.concatenate([of_scores, np.full(2 * self.basis_LB.shape[1], of_embedding)])

    def folded(self, weights_F: Float64Array) -> Familiarity:
        """The same function of scores and embeddings as they are."""
        best, background = weights_F[1:3] / self.deviation_2
        level_B, slope_B = weights_F[3:].reshape(2, -1)
        slope_B = 0.5 * slope_B / self.deviation_2[0]
        return Familiarity(
            offset=float(weights_F[0] - weights_F[1:3] @ (self.mean_2 / self.deviation_2)),
            best=float(best),
            background=float(background),
            width=self.width,
            landmarks_LD=self.landmarks_LD,
            level_L=self.basis_LB @ (level_B - slope_B * self.mean_2[0]),
            slope_L=self.basis_LB @ slope_B,
        )


def _logistic(
    features_NF: Float64Array, positive_N: BoolArray, weight_N: Float64Array, ridge_F: Float64Array
) -> Float64Array:
    """The weights `[F]` of a logistic regression with a ridge."""

    def loss(weights_F: Float64Array) -> float:
        fit = _log_loss(features_NF @ weights_F, positive_N, weight_N)
        return float(fit + 0.5 * (ridge_F * weights_F) @ weights_F)

    def derivatives(weights_F: Float64Array) -> tuple[Float64Array, Float64Array]:
        probability_N = _probability(features_NF @ weights_F)
        gradient_F = (weight_N * (probability_N - positive_N)) @ features_NF + ridge_F * weights_F
        curvature_N = weight_N * probability_N * (1.0 - probability_N)
        return gradient_F, (features_NF * curvature_N[:, None]).T @ features_NF + np.diag(ridge_F)

    return minimise(loss, derivatives, len(ridge_F), tolerance=1e-7)


def _log_loss(logit_N: Float64Array, positive_N: BoolArray, weight_N: Float64Array) -> float:
    return float(weight_N @ np.logaddexp(0.0, np.where(positive_N, -logit_N, logit_N)))


def _probability(logit_N: Float64Array) -> Float64Array:
    return 1.0 / (1.0 + np.exp(-np.clip(logit_N, -500, 500)))  # beyond, nothing changes but that exp overflows


def _sigmoid(logit: float) -> float:
    power = math.exp(-abs(logit))  # of either sign it cannot overflow
    return (1.0 if logit >= 0 else power) / (1.0 + power)
