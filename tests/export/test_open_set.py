"""Fitting an open-set model, and the images of nothing that it is fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.open_set import Examples, fit_open_set_model, outlier_images
from index.calibration import OpenSetModel


def _on_sphere(rng: np.random.Generator, count: int, width: int = 6) -> Any:
    embeddings_ND = rng.normal(size=(count, width))
    return (embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)).astype(np.float32)


def _with_hard_ones(count: int, seed: int) -> Examples:
    """Return each query twice: with its entity in the catalog and without. Scores fall along the first axis."""
    rng = np.random.default_rng(seed)
    embeddings_ND = _on_sphere(rng, count)
    hard_N = 0.3 * embeddings_ND[:, 0]
    best_N = np.concatenate([0.75 - hard_N, 0.6 - hard_N]) + rng.normal(0, 0.05, 2 * count)
    return Examples(
        best_N=best_N,
        background_N=np.full(2 * count, 0.3),
        embeddings_ND=np.tile(embeddings_ND, (2, 1)),
        in_catalog_N=np.arange(2 * count) < count,
        group_N=np.tile(np.arange(count), 2),
        weight_N=np.ones(2 * count),
    )


def _share_wrong(model: OpenSetModel, examples: Examples) -> float:
    """Return the share of examples on the wrong side of one half."""
    judged = zip(examples.best_N, examples.background_N, examples.embeddings_ND, strict=True)
    probability_N = np.array([model.probability(*each) for each in judged])
    return float(((probability_N > 0.5) != examples.in_catalog_N).mean())


def test_it_learns_which_queries_score_less() -> None:
    examples, others = _with_hard_ones(1500, seed=1), _with_hard_ones(1000, seed=2)
    model, held_out_N = fit_open_set_model(examples)
    wrong = _share_wrong(model, others)
    assert wrong < 0.085  # 0.067 is the least possible with this noise
    assert float(((held_out_N > 0.5) != examples.in_catalog_N).mean()) == pytest.approx(wrong, abs=0.015)
    without = Examples(**{**vars(examples), "embeddings_ND": np.zeros_like(examples.embeddings_ND)})
    blind, _ = fit_open_set_model(without)
    assert _share_wrong(blind, others) > 0.2  # by the best score alone


def test_from_few_examples_or_noise_embeddings_learn_little() -> None:
    """Cross-validation finds a larger penalty for uninformative embeddings. The smallest would give 0.12 for both."""
    rng = np.random.default_rng(3)
    examples = _with_hard_ones(400, seed=3)
    level = Examples(
        **{**vars(examples), "best_N": np.where(examples.in_catalog_N, 0.75, 0.6) + rng.normal(0, 0.05, 800)}
    )
    few = level.take(np.concatenate([np.arange(20), 400 + np.arange(20)]))
    for some in (level, few):
        model, _ = fit_open_set_model(some)
        probabilities = [model.probability(0.675, 0.3, embedding_D) for embedding_D in _on_sphere(rng, 200)]
        assert np.std(probabilities) < 0.07


def test_embeddings_of_made_up_queries_count_less() -> None:
    examples = _with_hard_ones(400, seed=3)
    embeddings_ND = _on_sphere(np.random.default_rng(4), 200)
    spread = []
    for made_up in (False, True):
        model, _ = fit_open_set_model(examples, made_up=made_up)
        spread.append(np.std([model.probability(0.675, 0.3, embedding_D) for embedding_D in embeddings_ND]))
    assert spread[1] < 0.7 * spread[0]


def test_examples_of_a_group_are_held_out_together() -> None:
    """Only memorising each group's embedding helps here, which must not generalise to other groups."""
    rng = np.random.default_rng(4)
    embeddings_ND = np.repeat(_on_sphere(rng, 100, 40), 4, axis=0)
    in_catalog_N = np.repeat(rng.random(100) < 0.5, 4)
    noise_N = rng.uniform(0.4, 0.6, 400)
    examples = Examples(
        best_N=noise_N, background_N=noise_N, embeddings_ND=embeddings_ND, in_catalog_N=in_catalog_N,
        group_N=np.repeat(np.arange(100), 4), weight_N=np.ones(400),
    )  # fmt: skip
    _, together_N = fit_open_set_model(examples)
    _, apart_N = fit_open_set_model(Examples(**{**vars(examples), "group_N": np.arange(400)}))
    right = [float(((each_N > 0.5) == in_catalog_N).mean()) for each_N in (together_N, apart_N)]
    assert right[0] < 0.65
    assert right[1] > 0.8


def test_no_weights_nearby_fit_better() -> None:
    examples = _with_hard_ones(60, seed=5)  # few enough for one penalty
    examples = Examples(**{**vars(examples), "background_N": np.random.default_rng(5).uniform(0.2, 0.4, 120)})
    fitted, _ = fit_open_set_model(examples)
    deviation_2 = np.array([examples.best_N.std(), examples.background_N.std()])
    mean_2 = np.array([examples.best_N.mean(), examples.background_N.mean()])
    near_N = np.exp((examples.embeddings_ND @ fitted.landmarks_LD.T - 1) / fitted.width)
    of_query_N = near_N @ fitted.level_L + examples.best_N * (near_N @ fitted.slope_L)

    def loss(change_2: Any, offset: float) -> float:
        weights_2 = np.array([fitted.best, fitted.background]) + change_2
        scores_N2 = np.column_stack([examples.best_N, examples.background_N])
        logit_N = fitted.offset - mean_2 @ change_2 + offset + scores_N2 @ weights_2 + of_query_N
        fit = np.logaddexp(0, np.where(examples.in_catalog_N, -logit_N, logit_N)).sum()
        return float(fit + 0.5 * ((weights_2 * deviation_2) ** 2).sum())

    least = loss(np.zeros(2), 0.0)
    for sign in (-1, 1):
        assert loss(np.array([0.3 * sign, 0]), 0.0) > least
        assert loss(np.array([0, 0.3 * sign]), 0.0) > least
        assert loss(np.zeros(2), 0.05 * sign) > least


def test_a_weight_of_two_counts_as_two_examples() -> None:
    examples = _with_hard_ones(40, seed=6)  # twice as many are still few enough for one penalty
    twice = examples.take(np.tile(np.arange(80), 2))
    heavy = Examples(**{**vars(examples), "weight_N": np.full(80, 2.0)})
    queries_ND = _on_sphere(np.random.default_rng(6), 5)
    models = [fit_open_set_model(each)[0] for each in (twice, heavy)]
    for query_D in queries_ND:
        first, second = (model.probability(0.6, 0.3, query_D) for model in models)
        assert first == pytest.approx(second, abs=0.02)


def test_at_most_a_fixed_number_of_examples_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.open_set._MAX_EXAMPLES", 90)
    _, held_out_N = fit_open_set_model(_with_hard_ones(60, seed=7))
    assert np.isnan(held_out_N).sum() == 30


@pytest.mark.parametrize("size_px", [1, 32, 112])
def test_outlier_images_have_the_requested_size(size_px: int) -> None:
    images = list(outlier_images(20, size_px))
    assert len(images) == 20
    assert {(image.shape, image.dtype) for image in images} == {((size_px, size_px, 3), np.dtype(np.uint8))}
    assert list(outlier_images(0, size_px)) == []


def test_outlier_images_depend_on_the_seed_only() -> None:
    def draw(count: int, seed: int = 0) -> list[bytes]:
        return [image.tobytes() for image in outlier_images(count, 32, seed=seed)]

    assert draw(20)[:9] == draw(9)
    assert len({*draw(20), *draw(20, seed=1)}) == 40


def test_some_outlier_images_are_plain_some_smooth_some_noisy() -> None:
    values = np.stack(list(outlier_images(80, 48))).astype(float)
    spread_B = values.std(axis=(1, 2)).max(axis=1)
    steps_B = np.abs(np.diff(values, axis=2)).mean(axis=(1, 2, 3))  # between neighbours
    assert (spread_B == 0).sum() == 10
    assert ((spread_B > 20) & (steps_B < 4)).sum() >= 10  # gradients, regions
    assert (steps_B > 20).sum() >= 10  # noise, fine stripes
