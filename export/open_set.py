"""Fit `index.calibration.OpenSetModel`, and draw the images without an entity that it is fitted to.

The fit maximises a penalised likelihood with L-BFGS. Examples of entities outside the catalog include images of nothing
(outlier exposure, Hendrycks et al., ICLR 2019). Without them the model would extrapolate.

Shapes: N examples, L landmarks, B basis functions, D embedding width, F features, S = size_px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from core.arrays import BoolArray, Float32Array, Float64Array, Int64Array, Pixels
from index.calibration import OpenSetModel

_LANDMARKS = 768
_MAX_EXAMPLES = 24_000
_MIN_EXAMPLES = 200  # with fewer, embeddings get the largest penalty
_FOLDS = 3
_SCORES_RIDGE = 1.0  # for features of mean 0 and deviation 1
_EMBEDDING_RIDGES = (0.1, 1.0, 10.0, 100.0)
_MIN_EIGENVALUE = 1e-4  # relative to the largest
_SEED = 7


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples to fit to. Those of a group are alike and are held out together, as photographs of one drawing are."""

    best_N: Float64Array
    background_N: Float64Array
    embeddings_ND: Float32Array
    in_catalog_N: BoolArray
    group_N: Int64Array
    weight_N: Float64Array

    @property
    def scores(self) -> Float64Array:
        """Return both scores, `[N, 2]`."""
        return np.column_stack([self.best_N, self.background_N])

    def take(self, chosen_N: Int64Array | BoolArray) -> Examples:
        return Examples(**{name: values[chosen_N] for name, values in vars(self).items()})


def fit_open_set_model(
    examples: Examples, *, made_up: bool = False, progress: bool = False
) -> tuple[OpenSetModel, Float64Array]:
    """Fit the model. Cross-validation over the groups chooses the penalty of the embedding's weights.

    If the queries are `made_up`, the penalty is the largest: all are made in one way, so cross-validation would trust
    their embeddings too much for other photographs.

    Also return each example's probability `[N]` under a fit without its group, to choose a threshold by. Of more than
    24,000 examples a random subset is used. The others have NaN.
    """
    total = len(examples.in_catalog_N)
    rng = np.random.default_rng(_SEED)
    used_N = np.sort(rng.permutation(total)[:_MAX_EXAMPLES])
    examples = examples.take(used_N)
    features = _Features.of(examples, rng)
    features_NF, in_catalog_N, weight_N = features(examples), examples.in_catalog_N, examples.weight_N
    groups, group_N = np.unique(examples.group_N, return_inverse=True)
    fold_N = rng.permutation(len(groups))[group_N] % _FOLDS
    enough = len(in_catalog_N) >= _MIN_EXAMPLES and len(groups) >= _FOLDS
    best_loss, ridge, held_out_N = math.inf, math.inf, np.zeros(0)
    candidates = _EMBEDDING_RIDGES if enough and not made_up else _EMBEDDING_RIDGES[-1:]
    for candidate in tqdm(candidates, desc="open set", unit="fit", disable=not progress):
        logit_N = np.empty(len(fold_N))
        for fold in range(_FOLDS):
            out_N = fold_N == fold
            weights_F = _fit_logistic(
                features_NF[~out_N], in_catalog_N[~out_N], weight_N[~out_N], features.ridge(candidate)
            )
            logit_N[out_N] = features_NF[out_N] @ weights_F
        loss = float(weight_N @ np.logaddexp(0.0, np.where(in_catalog_N, -logit_N, logit_N)))
        if loss < best_loss:
            best_loss, ridge, held_out_N = loss, candidate, logit_N
    weights_F = _fit_logistic(features_NF, in_catalog_N, weight_N, features.ridge(ridge))
    probability_N = np.full(total, np.nan)
    probability_N[used_N] = 1.0 / (1.0 + np.exp(-np.clip(held_out_N, -500, 500)))
    return features.model(weights_F), probability_N


def fit_scores_model(examples: Examples) -> OpenSetModel:
    """Fit a model of both scores alone, without landmarks."""
    mean_2, deviation_2 = examples.scores.mean(axis=0), np.maximum(examples.scores.std(axis=0), 1e-6)
    features_NF = np.column_stack([np.ones(len(examples.scores)), (examples.scores - mean_2) / deviation_2])
    ridge_F = np.array([1e-4, _SCORES_RIDGE, _SCORES_RIDGE])
    weights_F = _fit_logistic(features_NF, examples.in_catalog_N, examples.weight_N, ridge_F)
    best, background = (weights_F[1:] / deviation_2).tolist()
    offset = float(weights_F[0] - weights_F[1:] @ (mean_2 / deviation_2))
    return OpenSetModel(offset=offset, best=best, background=background)


@dataclass(frozen=True, kw_only=True)
class _Features:
    """The regression's features: 1, both scores standardised, nearness to landmarks, and nearness times the best score.

    `basis_LB` whitens nearness, so that the ridge is a Gaussian process prior.
    """

    landmarks_LD: Float32Array
    width: float
    basis_LB: Float64Array
    mean_2: Float64Array
    deviation_2: Float64Array

    @classmethod
    def of(cls, examples: Examples, rng: np.random.Generator) -> _Features:
        distinct_ND = np.unique(examples.embeddings_ND, axis=0)
        landmarks_LD = distinct_ND[rng.permutation(len(distinct_ND))[:_LANDMARKS]]
        landmarks_LD = landmarks_LD.astype(np.float16).astype(np.float32)  # as they are stored
        cosine_LL = landmarks_LD.astype(np.float64) @ landmarks_LD.T
        width = 1.5 * max(float((1.0 - cosine_LL).mean()), 1e-3)
        values_L, vectors_LL = np.linalg.eigh(np.exp((cosine_LL - 1.0) / width))
        used_L = values_L > _MIN_EIGENVALUE * values_L.max()
        return cls(
            landmarks_LD=landmarks_LD,
            width=width,
            basis_LB=vectors_LL[:, used_L] / np.sqrt(values_L[used_L]),
            mean_2=examples.scores.mean(axis=0),
            deviation_2=np.maximum(examples.scores.std(axis=0), 1e-6),
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

    def model(self, weights_F: Float64Array) -> OpenSetModel:
        """Return the same function, expressed in unstandardised scores and plain nearness."""
        best, background = weights_F[1:3] / self.deviation_2
        level_B, slope_B = weights_F[3:].reshape(2, -1)
        slope_B = 0.5 * slope_B / self.deviation_2[0]
        return OpenSetModel(
            offset=float(weights_F[0] - weights_F[1:3] @ (self.mean_2 / self.deviation_2)),
            best=float(best),
            background=float(background),
            width=self.width,
            landmarks_LD=self.landmarks_LD,
            level_L=self.basis_LB @ (level_B - slope_B * self.mean_2[0]),
            slope_L=self.basis_LB @ slope_B,
        )


def _fit_logistic(
    features_NF: Float64Array, positive_N: BoolArray, weight_N: Float64Array, ridge_F: Float64Array
) -> Float64Array:
    """Return the weights `[F]` of a weighted logistic regression with a ridge."""
    features, weight, ridge = (torch.from_numpy(values) for values in (features_NF, weight_N, ridge_F))
    sign = torch.from_numpy(np.where(positive_N, -1.0, 1.0))

    def loss(weights_F: Tensor) -> Tensor:
        return weight @ softplus(sign * (features @ weights_F)) + 0.5 * ridge @ weights_F.square()

    curvature_F = ridge + 0.25 * weight @ features.square()  # an upper bound of the Hessian's diagonal
    return minimise(loss, scale_F=curvature_F.rsqrt())


def minimise(loss: Callable[[Tensor], Tensor], *, scale_F: Tensor) -> Float64Array:
    """Return the weights `[F]` with the least loss. `scale_F`, about the size of each, conditions the problem."""
    scaled_F = torch.zeros_like(scale_F, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scaled_F], max_iter=1000, history_size=50, tolerance_grad=1e-7, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scaled_F * scale_F)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weights_F: Float64Array = (scaled_F.detach() * scale_F).numpy()
    return weights_F


def outlier_images(count: int, size_px: int, *, seed: int = 0) -> Iterator[Pixels]:
    """Yield `[S, S, 3]`: plain colours, gradients, blobs, noise, stripes, textures, regions and boxes, in turn."""
    rng = np.random.default_rng(seed)
    for draw in islice(cycle(_KINDS), count):
        yield np.clip(draw(rng, size_px), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> Float64Array:
    grey = rng.random() < 0.3
    return np.full(3, rng.uniform(0, 255)) if grey else rng.uniform(0, 255, 3)


def _ramp(rng: np.random.Generator, size_px: int) -> Float64Array:
    """Return 0 to 1 along a line or outwards from a point, `[S, S]`."""
    y, x = np.mgrid[-1 : 1 : size_px * 1j, -1 : 1 : size_px * 1j]
    if rng.random() < 0.6:
        angle = rng.uniform(0, 2 * np.pi)
        ramp: Float64Array = 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / (2 * np.sqrt(2))
    else:
        centre_x, centre_y = rng.uniform(-0.7, 0.7, 2)
        ramp = np.clip(np.hypot(x - centre_x, y - centre_y) / rng.uniform(0.7, 2.5), 0, 1)
    return ramp


def _blend(rng: np.random.Generator, share: Float64Array) -> Float64Array:
    return _colour(rng) * share[..., None] + _colour(rng) * (1 - share[..., None])


def _enlarge(pixels: Float64Array, size_px: int) -> Float64Array:
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC), np.float64)


def _plain(rng: np.random.Generator, size_px: int) -> Float64Array:
    return np.tile(_colour(rng), (size_px, size_px, 1))


def _gradient(rng: np.random.Generator, size_px: int) -> Float64Array:
    return _blend(rng, _ramp(rng, size_px))


def _blobs(rng: np.random.Generator, size_px: int) -> Float64Array:
    across = int(rng.integers(2, 24))
    blobs = rng.uniform(0, 255, (across, across, 3))
    return _enlarge(blobs.mean(axis=2, keepdims=True).repeat(3, 2) if rng.random() < 0.3 else blobs, size_px)


def _noise(rng: np.random.Generator, size_px: int) -> Float64Array:
    share = rng.uniform(0.1, 1)
    noise = rng.uniform(0, 255, (size_px, size_px, 3 if rng.random() < 0.5 else 1))
    return noise * share + _colour(rng) * (1 - share)


def _stripes(rng: np.random.Generator, size_px: int) -> Float64Array:
    wave = np.sin(_ramp(rng, size_px) * rng.uniform(8, 150))
    if rng.random() < 0.5:
        wave = np.sign(wave)
    if rng.random() < 0.3:  # checks
        wave = wave * np.sign(np.sin(_ramp(rng, size_px) * rng.uniform(8, 120)))
    return _blend(rng, (wave + 1) / 2)


def _texture(rng: np.random.Generator, size_px: int) -> Float64Array:
    """Return noise at every scale, like clouds, stone or cloth."""
    persistence = rng.uniform(0.4, 0.9)
    texture = np.tile(_colour(rng), (size_px, size_px, 1))
    contrast = rng.uniform(0.3, 1)
    for octave in range(6):
        layer = _enlarge(rng.uniform(0, 255, (3 << octave, 3 << octave, 3)), size_px) - 128
        texture += contrast * persistence**octave * layer
    return texture


def _regions(rng: np.random.Generator, size_px: int) -> Float64Array:
    edges = np.sort(rng.uniform(0.2, 0.8, int(rng.integers(1, 4))))
    colours: Float64Array = np.array([_colour(rng) for _ in range(len(edges) + 1)])
    return colours[np.digitize(_ramp(rng, size_px), edges)]


def _boxes(rng: np.random.Generator, size_px: int) -> Float64Array:
    image = _plain(rng, size_px)
    for _ in range(int(rng.integers(2, 12))):
        left, top = rng.integers(0, size_px, 2)
        width, height = rng.integers(size_px // 20 + 1, size_px * 2 // 3 + 2, 2)
        image[top : top + height, left : left + width] = _colour(rng)
    return image


_KINDS: tuple[Callable[[np.random.Generator, int], Float64Array], ...] = (
    _plain, _gradient, _blobs, _noise, _stripes, _texture, _regions, _boxes,
)  # fmt: skip
