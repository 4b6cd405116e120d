"""The choice between an entity's nearest image and their mean, against a slow loop."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from export.leave_one_out import Fold, choose_pooling, stored_folds
from index.embeddings import Embeddings, Pooling

DIM = 24
Vectors = npt.NDArray[np.float64]


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def catalog(rows_N: list[int], *, noise: float, views: int = 1, parts: int = 1, seed: int = 0) -> Embeddings:
    """Images of an entity are scattered around one direction, or around one of several in turn."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(max(rows_N) + 1, views, DIM)))
    seen: dict[int, int] = {}
    images = []
    for row in rows_N:
        number = seen[row] = seen.get(row, -1) + 1
        images.append(centres[row, number % views] + noise * rng.normal(size=DIM) / DIM**0.5)
    stored = unit(np.array(images)).astype(np.float16)
    return Embeddings(DIM, np.array_split(stored, parts), np.array_split(np.array(rows_N), parts))


def slow_choice(images: Embeddings, default: Pooling) -> Pooling:
    """Leave the same image of every entity out, and count the others' errors one by one."""
    by_row = {row: images.images_of(row).astype(np.float64) for row in set(images.rows_N.tolist())}
    found = {"nearest": 0, "mean": 0}
    for number in range(4):
        kept = {row: np.delete(each, number % len(each), 0) if len(each) > 1 else each for row, each in by_row.items()}
        for own, own_images in by_row.items():
            if len(own_images) >= 3 and number < len(own_images):
                query_D = own_images[number]
                nearest = {row: float((each @ query_D).max()) for row, each in kept.items()}
                mean = {row: float(unit(each.mean(axis=0)) @ query_D) for row, each in kept.items()}
                found["nearest"] += max(nearest, key=nearest.__getitem__) == own
                found["mean"] += max(mean, key=mean.__getitem__) == own
    if found["nearest"] == found["mean"]:
        return default
    return "mean" if found["mean"] > found["nearest"] else "nearest"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parts", [1, 4])
def test_the_choice_is_that_of_a_slow_loop(seed: int, parts: int) -> None:
    rows_N = [row for row in range(30) for _ in range(1 + row % 5)]
    images = catalog(rows_N, noise=1.6, parts=parts, seed=seed)
    for default in ("nearest", "mean"):
        assert choose_pooling(images, stored_folds(images), default=default) == slow_choice(images, default)


def test_scattered_images_are_averaged_and_different_views_are_not() -> None:
    rows_N = [row for row in range(60) for _ in range(4)]
    scattered, views = catalog(rows_N, noise=2.0), catalog(rows_N, noise=0.7, views=2)
    assert choose_pooling(scattered, stored_folds(scattered), default="nearest") == "mean"
    assert choose_pooling(views, stored_folds(views), default="mean") == "nearest"


def test_the_default_decides_where_nothing_can_be_measured() -> None:
    two = catalog([0, 0, 1, 1, 2], noise=0.5)
    assert choose_pooling(two, stored_folds(two), default="mean") == "mean"
    assert choose_pooling(two, stored_folds(two), default="nearest") == "nearest"
    one = catalog([0, 1, 2], noise=0.5)
    assert choose_pooling(one, stored_folds(one), default="mean") == "nearest"


def test_labelled_queries_decide_without_leaving_images_out() -> None:
    images = Embeddings(2, [np.eye(2, dtype=np.float16)[[0, 1, 0]]], [np.array([0, 0, 1])])
    query = Fold(queries_QD=unit(np.array([[1.01, 1.0]])).astype(np.float32), own_Q=np.array([0]))
    assert choose_pooling(images, [query], default="nearest") == "mean"
    query = Fold(queries_QD=np.array([[0.0, 1.0]], np.float32), own_Q=np.array([0]))
    assert choose_pooling(images, [query], default="mean") == "mean"  # both find it
