"""What a query is tells how much it scores, known or not; what no query is like is not judged by extrapolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.familiarity import Examples, Familiarity, fit_familiarity

SMALL = Familiarity(
    offset=-1.0,
    best=8.0,
    background=-4.0,
    width=0.5,
    landmarks_LD=np.eye(2, 3, dtype=np.float32),
    level_L=np.array([1.0, -2.0]),
    slope_L=np.array([0.5, 3.0]),
)


def _on_sphere(rng: np.random.Generator, count: int, width: int = 6) -> Any:
    embeddings_ND = rng.normal(size=(count, width))
    return (embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)).astype(np.float32)


def _with_hard_ones(count: int, seed: int) -> Examples:
    """Each query twice, with its entity and without. The further along the first axis, the less it scores."""
    rng = np.random.default_rng(seed)
    embeddings_ND = _on_sphere(rng, count)
    hard_N = 0.3 * embeddings_ND[:, 0]
    best_N = np.concatenate([0.75 - hard_N, 0.6 - hard_N]) + rng.normal(0, 0.05, 2 * count)
    return Examples(
        best_N=best_N,
        background_N=np.full(2 * count, 0.3),
        embeddings_ND=np.tile(embeddings_ND, (2, 1)),
        known_N=np.arange(2 * count) < count,
        group_N=np.tile(np.arange(count), 2),
        weight_N=np.ones(2 * count),
    )


def _share_wrong(familiarity: Familiarity, examples: Examples) -> float:
    """Of examples parted at one half."""
    judged = zip(examples.best_N, examples.background_N, examples.embeddings_ND, strict=True)
    probability_N = np.array([familiarity.known(*each) for each in judged])
    return float(((probability_N > 0.5) != examples.known_N).mean())


def test_it_is_a_sigmoid_of_scores_and_nearness() -> None:
    embedding_D = np.array([0.6, 0.8, 0.0], np.float32)
    near_1, near_2 = np.exp((0.6 - 1) / 0.5), np.exp((0.8 - 1) / 0.5)
    logit = -1 + 8 * 0.7 - 4 * 0.3 + near_1 * (1 + 0.5 * 0.7) + near_2 * (-2 + 3 * 0.7)
    assert SMALL.known(0.7, 0.3, embedding_D) == pytest.approx(1 / (1 + np.exp(-logit)))
    assert SMALL.known(1e6, 0.0, embedding_D) == 1.0
    assert SMALL.known(-1e6, 0.0, embedding_D) == 0.0


def test_it_learns_which_queries_score_less() -> None:
    examples, others = _with_hard_ones(1500, seed=1), _with_hard_ones(1000, seed=2)
    familiarity, held_out_N = fit_familiarity(examples)
    wrong = _share_wrong(familiarity, others)
    assert wrong < 0.085  # 0.067 by the deviations
    assert float(((held_out_N > 0.5) != examples.known_N).mean()) == pytest.approx(wrong, abs=0.015)
    without = Examples(**{**vars(examples), "embeddings_ND": np.zeros_like(examples.embeddings_ND)})
    blind, _ = fit_familiarity(without)
    assert _share_wrong(blind, others) > 0.2  # by the best score alone


def test_of_few_or_of_noise_it_learns_little_more_than_the_scores_tell() -> None:
    """Where embeddings say nothing, their penalty is found to be larger; with the least, 0.12 here for both."""
    rng = np.random.default_rng(3)
    examples = _with_hard_ones(400, seed=3)
    level = Examples(**{**vars(examples), "best_N": np.where(examples.known_N, 0.75, 0.6) + rng.normal(0, 0.05, 800)})
    few = level.take(np.concatenate([np.arange(20), 400 + np.arange(20)]))
    for some in (level, few):
        familiarity, _ = fit_familiarity(some)
        said = [familiarity.known(0.675, 0.3, embedding_D) for embedding_D in _on_sphere(rng, 200)]
        assert np.std(said) < 0.07


def test_examples_of_a_group_are_held_out_together() -> None:
    """The embedding is the group's own, and all of a group are known or none is: to be learned by heart only."""
    rng = np.random.default_rng(4)
    embeddings_ND = np.repeat(_on_sphere(rng, 100, 40), 4, axis=0)
    known_N = np.repeat(rng.random(100) < 0.5, 4)
    noise_N = rng.uniform(0.4, 0.6, 400)
    examples = Examples(
        best_N=noise_N, background_N=noise_N, embeddings_ND=embeddings_ND, known_N=known_N,
        group_N=np.repeat(np.arange(100), 4), weight_N=np.ones(400),
    )  # fmt: skip
    _, together_N = fit_familiarity(examples)
    _, apart_N = fit_familiarity(Examples(**{**vars(examples), "group_N": np.arange(400)}))
    right = [float(((each_N > 0.5) == known_N).mean()) for each_N in (together_N, apart_N)]
    assert right[0] < 0.65
    assert right[1] > 0.8


def test_it_is_the_best_fit_of_all_around_it() -> None:
    """Of weights of the scores, with their penalty, at the chosen weights of embeddings."""
    examples = _with_hard_ones(60, seed=5)  # few enough for one penalty
    examples = Examples(**{**vars(examples), "background_N": np.random.default_rng(5).uniform(0.2, 0.4, 120)})
    fitted, _ = fit_familiarity(examples)
    deviation_2 = np.array([examples.best_N.std(), examples.background_N.std()])
    mean_2 = np.array([examples.best_N.mean(), examples.background_N.mean()])
    near_N = np.exp((examples.embeddings_ND @ fitted.landmarks_LD.T - 1) / fitted.width)
    of_query_N = near_N @ fitted.level_L + examples.best_N * (near_N @ fitted.slope_L)

    def loss(change_2: Any, offset: float) -> float:
        weights_2 = np.array([fitted.best, fitted.background]) + change_2
        scores_N2 = np.column_stack([examples.best_N, examples.background_N])
        logit_N = fitted.offset - mean_2 @ change_2 + offset + scores_N2 @ weights_2 + of_query_N
        fit = np.logaddexp(0, np.where(examples.known_N, -logit_N, logit_N)).sum()
        return float(fit + 0.5 * ((weights_2 * deviation_2) ** 2).sum())

    least = loss(np.zeros(2), 0.0)
    for sign in (-1, 1):
        assert loss(np.array([0.3 * sign, 0]), 0.0) > least
        assert loss(np.array([0, 0.3 * sign]), 0.0) > least
        assert loss(np.zeros(2), 0.05 * sign) > least


def test_weights_count_as_so_many_examples() -> None:
    examples = _with_hard_ones(40, seed=6)  # twice as many are still few enough for one penalty
    twice = examples.take(np.tile(np.arange(80), 2))
    heavy = Examples(**{**vars(examples), "weight_N": np.full(80, 2.0)})
    queries_ND = _on_sphere(np.random.default_rng(6), 5)
    said = [[fit_familiarity(each)[0].known(0.6, 0.3, query_D) for query_D in queries_ND] for each in (twice, heavy)]
    assert said[0] == pytest.approx(said[1], abs=0.02)


def test_of_too_many_examples_some_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.familiarity._MOST_EXAMPLES", 90)
    _, held_out_N = fit_familiarity(_with_hard_ones(60, seed=7))
    assert np.isnan(held_out_N).sum() == 30


def test_it_survives_its_file_and_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    fitted, _ = fit_familiarity(_with_hard_ones(120, seed=8))
    files = [tmp_path / name for name in ("a.npz", "b.npz")]
    fitted.write(files[0])
    read = Familiarity.read(files[0])
    read.write(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    for query_D in _on_sphere(np.random.default_rng(8), 5):
        assert read.known(0.6, 0.3, query_D) == fitted.known(0.6, 0.3, query_D)
