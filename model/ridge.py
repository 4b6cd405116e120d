"""Ridge regression from an entity's text to its image embedding: where the adaptor starts from, or all of it.

The mean text token is mapped to the deviation of the image embedding from the mean one. A closed form is fitted in
seconds. Cross-validation over entities chooses the penalty, and the share of the prediction in the embedding of an
entity with an image.

Shapes: N entities, E of them that are fitted, I images, Q queries, L text channels, D embedding.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from core.arrays import BoolArray, Float32Array, Float64Array, Int64Array, normalised
from model.adaptor import Adaptor
from model.validation import Accuracy, measure

_PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # as multiples of the mean variance of a channel, per sample of E = L
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
_FOLDS = 5
_MAX_ENTITIES = 50_000
_MAX_QUERIES = 2048


@dataclass(frozen=True, kw_only=True)
class RidgeData:
    """Entities with their mean text token, their images, and labelled queries. All embeddings are query embeddings."""

    texts_NL: Float32Array  # zeros without a text
    has_text_N: BoolArray
    images_ID: Float32Array
    owner_I: Int64Array  # entity of each image
    queries_QD: Float32Array
    entity_Q: Int64Array
    seen_Q: Int64Array | None = None  # queries that choose the share: 1 of a seen entity, 0 unseen, -1 not; None: all

    def targets(self, *, with_queries: bool) -> tuple[Int64Array, Float32Array]:
        """Return the entities [E] that have a text and an image, and the normalised sum of their images [E, D]."""
        owner, images = self.owner_I, self.images_ID
        if with_queries:
            owner, images = np.concatenate([owner, self.entity_Q]), np.concatenate([images, self.queries_QD])
        sums_ND = np.zeros((len(self.has_text_N), images.shape[1]), np.float32)
        np.add.at(sums_ND, owner, images)
        usable_E = np.flatnonzero(self.has_text_N & sums_ND.any(axis=1))
        return usable_E, normalised(sums_ND[usable_E])


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """Predicts the deviation `text_L @ weight_LD + bias_D` from the mean image embedding."""

    penalty: float
    text_share: float = 0.0
    weight_LD: Float64Array = field(default_factory=lambda: np.zeros(0))
    bias_D: Float64Array = field(default_factory=lambda: np.zeros(0))
    mean_D: Float64Array = field(default_factory=lambda: np.zeros(0))
    without: Accuracy | None = None  # in cross-validation, with a text share of 0
    accuracy: Accuracy | None = None  # in cross-validation, with the chosen one

    def describe(self) -> dict[str, Any]:
        """Return plain values for a report: what was chosen, and the accuracy in cross-validation."""
        accuracies = {"without": self.without, "accuracy": self.accuracy}
        values = {name: asdict(accuracy) if accuracy else None for name, accuracy in accuracies.items()}
        return {"penalty": self.penalty, "text_share": self.text_share, **values}

    def deviations(self, texts_EL: Float32Array) -> Float32Array:
        return (texts_EL @ self.weight_LD + self.bias_D).astype(np.float32)

    def start(self, adaptor: Adaptor) -> None:
        """Let the adaptor start from this regression."""
        values = {
            "ridge_LD": self.weight_LD,
            "ridge_bias_D": self.bias_D,
            "mean_image_D": self.mean_D,
            "text_share": np.float64(self.text_share),
        }
        for name, value in values.items():
            buffer = adaptor.get_buffer(name)
            buffer.copy_(torch.as_tensor(value, dtype=buffer.dtype))


def fit_ridge(data: RidgeData, *, seed: int) -> Ridge:
    """Fit the regression to all entities, with a penalty and a text share from a cross-validation over entities.

    Folds are over entities with labelled queries. The penalty is the one that predicts left-out entities best, by
    cosine. The share is the one with the best harmonic mean of accuracy on fitted and left-out entities, where the
    queries are no targets. Where `seen_Q` names unseen entities, only they count as left out: encoders may know the
    texts of others. With fewer than five such entities the share is 0.
    """
    return refit(_cross_validate(data, seed), data, frozenset())


def refit(ridge: Ridge, data: RidgeData, left_out: frozenset[int]) -> Ridge:
    """Fit the regression without some entities, with the same penalty and text share."""
    rows_E, targets_ED = data.targets(with_queries=True)
    fitted_E = ~np.isin(rows_E, list(left_out))
    (fitted,) = _solve(data.texts_NL[rows_E[fitted_E]], targets_ED[fitted_E], [ridge.penalty])
    return replace(ridge, weight_LD=fitted.weight_LD, bias_D=fitted.bias_D, mean_D=fitted.mean_D)


def _cross_validate(data: RidgeData, seed: int) -> Ridge:
    """Return the best penalty and text share, not fitted."""
    rng = np.random.default_rng(seed)
    rows_E, targets_ED = data.targets(with_queries=True)
    labelled = np.intersect1d(rows_E, data.entity_Q)
    if len(labelled) < _FOLDS:
        return Ridge(penalty=_PENALTIES[3])
    fold_N = np.full(len(data.has_text_N), -1)
    fold_N[labelled] = rng.permutation(len(labelled)) % _FOLDS
    cosines = np.zeros(len(_PENALTIES))
    for fold in range(_FOLDS):
        out_E = fold_N[rows_E] == fold
        for number, ridge in enumerate(_solve(data.texts_NL[rows_E[~out_E]], targets_ED[~out_E], _PENALTIES)):
            predicted_ED = normalised(ridge.deviations(data.texts_NL[rows_E[out_E]]))
            cosines[number] += float((predicted_ED * normalised(targets_ED[out_E] - ridge.mean_D)).sum())
    penalty = _PENALTIES[int(cosines.argmax())]

    rows_E, targets_ED = data.targets(with_queries=False)
    chooses_Q = fold_N[data.entity_Q] >= 0
    if data.seen_Q is not None:
        chooses_Q &= data.seen_Q >= 0
    queries_Q = np.flatnonzero(chooses_Q)
    if len(queries_Q) > _MAX_QUERIES:
        queries_Q = rng.choice(queries_Q, _MAX_QUERIES, replace=False)
    correct: list[list[BoolArray]] = [[] for _ in _SHARES]
    seen: list[bool] = []
    for fold in range(_FOLDS):
        fitted_E = fold_N[rows_E] != fold
        (ridge,) = _solve(data.texts_NL[rows_E[fitted_E]], targets_ED[fitted_E], [penalty])
        fitted_Q = fold_N[data.entity_Q[queries_Q]] != fold
        counts_Q = fitted_Q == (fitted_Q if data.seen_Q is None else data.seen_Q[queries_Q])
        asked_Q = queries_Q[counts_Q]
        seen += fitted_Q[counts_Q].tolist()
        for of_share, share in zip(correct, _SHARES, strict=True):
            embeddings_ID, owner_I = _starts(data, ridge, share)
            best_Q = owner_I[(data.queries_QD[asked_Q] @ embeddings_ID.T).argmax(axis=1)]
            of_share.append(best_Q == data.entity_Q[asked_Q])
    accuracies = [measure(np.concatenate(of_share), seen) for of_share in correct]
    best = max(range(len(_SHARES)), key=lambda number: accuracies[number].rank())
    return Ridge(penalty=penalty, text_share=_SHARES[best], without=accuracies[0], accuracy=accuracies[best])


def _starts(data: RidgeData, ridge: Ridge, share: float) -> tuple[Float32Array, Int64Array]:
    """Return the embeddings that entities start from, as `Adaptor` computes them, and the entity of each."""
    deviations_ND = ridge.deviations(data.texts_NL)
    share_I1 = share * data.has_text_N[data.owner_I, None]
    with_image_ID = (1 - share_I1) * data.images_ID + share_I1 * normalised(deviations_ND)[data.owner_I]
    without_E = np.setdiff1d(np.flatnonzero(data.has_text_N), data.owner_I)
    embeddings = [with_image_ID, (ridge.mean_D + deviations_ND[without_E])]
    return normalised(np.concatenate(embeddings)), np.concatenate([data.owner_I, without_E])


def _solve(texts_EL: Float32Array, targets_ED: Float32Array, penalties: Sequence[float]) -> list[Ridge]:
    """Return the regression for each penalty, from one eigendecomposition. Fitted to nothing, it predicts zero."""
    if len(texts_EL) > _MAX_ENTITIES:
        drawn = np.random.default_rng(0).choice(len(texts_EL), _MAX_ENTITIES, replace=False)
        texts_EL, targets_ED = texts_EL[drawn], targets_ED[drawn]
    if not len(texts_EL):
        weight_LD, zero_D = np.zeros((texts_EL.shape[1], targets_ED.shape[1])), np.zeros(targets_ED.shape[1])
        return [Ridge(penalty=penalty, weight_LD=weight_LD, bias_D=zero_D, mean_D=zero_D) for penalty in penalties]
    mean_L, mean_D = texts_EL.mean(axis=0, dtype=np.float64), targets_ED.mean(axis=0, dtype=np.float64)
    centred_EL = texts_EL - mean_L
    # Some channels of language models vary far more than the rest.
    scale_L = np.maximum(centred_EL.std(axis=0), 1e-6)
    centred_EL /= scale_L
    eigenvalues_L, vectors_LL = np.linalg.eigh(centred_EL.T @ centred_EL)
    projected_LD = vectors_LL.T @ (centred_EL.T @ (targets_ED - mean_D))
    fitted = []
    for penalty in penalties:
        damped_L1 = (np.maximum(eigenvalues_L, 0) + penalty * texts_EL.shape[1])[:, None]
        weight_LD = vectors_LL @ (projected_LD / damped_L1) / scale_L[:, None]
        fitted.append(Ridge(weight_LD=weight_LD, bias_D=-mean_L @ weight_LD, mean_D=mean_D, penalty=penalty))
    return fitted
