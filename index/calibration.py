"""Confidences from scores: what a bundle stores, applied. `export.calibrate` fits it.

Confidences are a softmax over the ten best scores `s` with one more choice, "none of these" (temperature scaling, Guo
et al., ICML 2017):

    P(k) = exp(slope * s_k) / (exp(none) + sum_j exp(slope * s_j)),  none = none_offset + none_slope * background

`background` is the mean of the scores after the first: what the query scores against any entity. A near twin of the
best entity lowers the confidence, and so does a high background. The confidences of an answer sum to less than 1.

Whether the catalog has the entity at all is a second question. `OpenSetModel` answers it.

Several photographs of one thing are a query of their own kind: the mean of their embeddings is nearer to everything. So
their confidences have a softmax for each number of photographs, one included. It has one more parameter, a `ceiling`
that all confidences are multiplied by: near twins can be wrong even where nothing else comes near.

Shapes: D embedding width, L landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from core.arrays import Float32Array, Float64Array
from core.errors import BundleAltered
from core.files import atomic_write
from index.levels import LevelModel, sigmoid

CANDIDATES = 10  # scores that the softmax and the background are taken over
_OF_SCORES = ("offset", "best", "background")  # of an `OpenSetModel` without landmarks
_SCALARS = (*_OF_SCORES, "width")
_NOT_NUMBERS = frozenset(("open_set_model", "views", "level"))


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenSetModel:
    """The probability that the catalog has the query's entity, assuming that half of the queries show one that it has.

    The best score alone does not answer that. The encoder makes little of a blurred photograph, and then even the right
    entity is far away. So a logistic regression on the best score `s` and the background also sees the query embedding
    `q`, by its distance to landmarks `c_l`, which are some of the embeddings that it was fitted to:

        logit = offset + best * s + background * mean + sum_l exp((q . c_l - 1) / width) * (level_l + slope_l * s)

    The sum is a Gaussian process on the sphere in the Nyström approximation (Williams and Seeger, NeurIPS 2000). There
    are no landmarks if scores have to be enough.
    """

    offset: float
    best: float
    background: float
    width: float = 1.0
    landmarks_LD: Float32Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    level_L: Float64Array = field(default_factory=lambda: np.zeros(0))
    slope_L: Float64Array = field(default_factory=lambda: np.zeros(0))

    def probability(self, best: float, background: float, embedding_D: Float32Array) -> float:
        logit = self.offset + self.best * best + self.background * background
        if len(self.landmarks_LD):
            nearness_L = np.exp((self.landmarks_LD @ embedding_D - 1.0) / self.width)
            logit += float(nearness_L @ self.level_L) + best * float(nearness_L @ self.slope_L)
        return sigmoid(logit)

    def write(self, path: Path) -> None:
        """Write an `.npz` file. Equal models give equal bytes."""
        scalars = np.array([getattr(self, name) for name in _SCALARS])
        weights_2L = np.stack([self.level_L, self.slope_L])
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, scalars=scalars, landmarks=self.landmarks_LD.astype(np.float16), weights=weights_2L)

    @classmethod
    def read(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as content:
            scalars = dict(zip(_SCALARS, content["scalars"].tolist(), strict=True))
            level_L, slope_L = content["weights"]
            landmarks_LD = content["landmarks"].astype(np.float32)
            return cls(**scalars, landmarks_LD=landmarks_LD, level_L=level_L, slope_L=slope_L)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The softmax's parameters, and the in-catalog probability below which an answer abstains.

    `queries`, `correct` and `unknown` describe the fit: validation queries, those answered correctly, and examples of
    entities outside the catalog. `open_set_model` is None in bundles of a single entity and in some older ones. Then
    the in-catalog probability is one minus the probability of "none of these".

    `views` has the calibrations by the number of photographs of one thing. Those of several have open-set models of
    scores alone. Versions before 0.3 ignore them, and `level`, which is None if it could not be fitted.
    """

    slope: float
    none_offset: float
    none_slope: float
    abstain_below: float
    queries: int
    correct: int
    unknown: int
    candidates: int = CANDIDATES
    ceiling: float = 1.0
    open_set_model: OpenSetModel | None = None
    views: Mapping[int, Calibration] = field(default_factory=dict)
    level: LevelModel | None = None

    def of_views(self, views: int) -> Calibration:
        """Return the calibration of this number of photographs, or of the largest smaller number that has one."""
        return self.views[max(fitted)] if (fitted := [each for each in self.views if each <= views]) else self

    def judge(self, scores: Sequence[float], background: float, embedding_D: Float32Array) -> tuple[list[float], float]:
        """Return the probability of being right of each prediction, and that the catalog has the query's entity.

        `scores` are those of the predictions, best first. `background` is that of the whole catalog, even if the
        predictions were filtered. Without predictions, the second probability is 0.
        """
        none = self.none_offset + self.none_slope * background
        logits = [self.slope * score for score in scores]
        total = _log_sum_exp([none, *logits[: self.candidates]])
        confidences = [self.ceiling * math.exp(min(logit - total, 0.0)) for logit in logits]
        if self.open_set_model is None or not scores:
            return confidences, 1.0 - math.exp(none - total)
        return confidences, self.open_set_model.probability(scores[0], background, embedding_D)

    def abstains(self, in_catalog_probability: float) -> bool:
        return in_catalog_probability < self.abstain_below

    def to_dict(self) -> dict[str, Any]:
        """Return everything but an `open_set_model` with landmarks, which has its own file."""
        content = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NOT_NUMBERS}
        if self.ceiling == 1.0:
            del content["ceiling"]
        if self.level is not None:
            content["level"] = self.level.to_dict()
        if self.views:
            content["views"] = {str(number): each.to_dict() for number, each in self.views.items()}
        if (model := self.open_set_model) is not None and not len(model.landmarks_LD):
            content |= {name: getattr(model, name) for name in _OF_SCORES}
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], open_set_model: OpenSetModel | None = None) -> Self:
        """Read what `to_dict` returns. Unknown entries are ignored. `open_set_model` is the one with landmarks.

        The oldest bundles have a sigmoid of the best score with parameters `a` and `b`. That is a softmax of one
        candidate.
        """
        if "a" in content:
            sigmoid = {"slope": content["a"], "none_offset": -content["b"], "none_slope": 0.0}
            content = {**sigmoid, "unknown": 0, "candidates": 1, **content}
        known = ({each.name for each in fields(cls)} - _NOT_NUMBERS) & content.keys()
        for name in sorted(known | set(_OF_SCORES) & content.keys()):
            if not isinstance(content[name], int | float):
                raise BundleAltered(f"calibration.{name} must be a number; export the bundle again")
        try:
            views = {
                int(number): cls.from_dict(each, open_set_model) for number, each in content.get("views", {}).items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise BundleAltered("calibration.views is malformed; export the bundle again") from error
        level = LevelModel.from_dict(content["level"]) if "level" in content else None
        if content.keys() >= set(_OF_SCORES):
            open_set_model = OpenSetModel(**{name: content[name] for name in _OF_SCORES})
        numbers = {name: content[name] for name in known}
        return cls(**numbers, open_set_model=open_set_model, views=views, level=level)


def background(scores: Sequence[float]) -> float:
    """Return the mean of the best scores after the first, of a search over the whole catalog."""
    others = list(scores[1:CANDIDATES]) or list(scores[:1])
    return sum(others) / len(others) if others else 0.0


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum([math.exp(value - most) for value in values]))
