"""The ridge regression that the adaptor starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from core.arrays import normalised
from model.adaptor import Adaptor, AdaptorConfig
from model.ridge import RidgeData, _solve, _starts, fit_ridge, refit

ENTITIES, L, D = 40, 6, 12


def data(*, informative: bool = True, labelled: int = 30) -> RidgeData:
    """Return entities with one image and noisy queries. Informative texts determine what an entity looks like."""
    rng = np.random.default_rng(0)
    texts_NL = rng.normal(size=(ENTITIES, L)).astype(np.float32)
    looks_ND = 1.0 + (texts_NL if informative else rng.normal(size=(ENTITIES, L))) @ rng.normal(size=(L, D))
    entity_Q = np.repeat(np.arange(labelled), 2)

    def photograph(entities: np.ndarray) -> np.ndarray:
        return normalised((looks_ND[entities] + 2.5 * rng.normal(size=(len(entities), D))).astype(np.float32))

    return RidgeData(
        texts_NL=texts_NL,
        has_text_N=np.ones(ENTITIES, bool),
        images_ID=photograph(np.arange(ENTITIES)),
        owner_I=np.arange(ENTITIES),
        queries_QD=photograph(entity_Q),
        entity_Q=entity_Q,
    )


def test_it_solves_the_normal_equations_of_standardised_texts() -> None:
    rng = np.random.default_rng(1)
    texts_EL, targets_ED = rng.normal(3, [1, 50, 0.1], (20, 3)).astype(np.float32), rng.normal(size=(20, 4))
    scaled_EL = (texts_EL - texts_EL.mean(axis=0)) / texts_EL.std(axis=0)
    expected_LD = np.linalg.solve(
        scaled_EL.T @ scaled_EL + 2.0 * 3 * np.eye(3), scaled_EL.T @ (targets_ED - targets_ED.mean(axis=0))
    )
    _, ridge = _solve(texts_EL, targets_ED.astype(np.float32), [1.0, 2.0])
    np.testing.assert_allclose(ridge.deviations(texts_EL), scaled_EL @ expected_LD, atol=1e-4)
    np.testing.assert_allclose(ridge.mean_D, targets_ED.mean(axis=0), atol=1e-6)


def test_texts_that_help_get_a_share_and_others_none() -> None:
    ridge = fit_ridge(data(), seed=0)
    assert ridge.text_share >= 0.3
    assert ridge.accuracy is not None
    assert ridge.without is not None
    assert ridge.accuracy.unseen > ridge.without.unseen + 0.1  # type: ignore[operator]
    assert fit_ridge(data(informative=False), seed=0).text_share == 0.0


def test_only_entities_named_unseen_choose_the_share() -> None:
    """The last ten labelled entities look as no text says, and only they are unseen."""
    informed, misled = data(), data(informative=False)
    first_Q, first_I = informed.entity_Q < 20, informed.owner_I < 20
    mixed = replace(
        informed,
        images_ID=np.where(first_I[:, None], informed.images_ID, misled.images_ID),
        queries_QD=np.where(first_Q[:, None], informed.queries_QD, misled.queries_QD),
    )
    assert fit_ridge(mixed, seed=0).text_share >= 0.2
    named = replace(mixed, seen_Q=np.where(first_Q, -1, 0))
    assert fit_ridge(named, seed=0).text_share == 0.0


@pytest.mark.parametrize("labelled", [0, 4])
def test_with_too_few_labelled_entities_the_image_counts_alone(labelled: int) -> None:
    ridge = fit_ridge(data(labelled=labelled), seed=0)
    assert (ridge.text_share, ridge.accuracy) == (0.0, None)
    assert np.abs(ridge.weight_LD).max() > 0  # for entities without an image


def test_left_out_entities_do_not_count() -> None:
    given = data()
    ridge = fit_ridge(given, seed=0)
    other = given.images_ID.copy()
    other[7] = -other[7]
    without_QD = given.queries_QD * (given.entity_Q != 7)[:, None]
    changed = RidgeData(**{**vars(given), "images_ID": other, "queries_QD": without_QD})
    np.testing.assert_array_equal(
        refit(ridge, given, frozenset({7})).weight_LD, refit(ridge, changed, frozenset({7})).weight_LD
    )
    assert not np.array_equal(refit(ridge, changed, frozenset()).weight_LD, ridge.weight_LD)


def test_without_texts_or_images_nothing_is_predicted() -> None:
    given = data()
    blank = RidgeData(**{**vars(given), "has_text_N": np.zeros(ENTITIES, bool)})
    assert not fit_ridge(blank, seed=0).weight_LD.any()


def test_the_adaptor_starts_where_cross_validation_looked() -> None:
    given = data()
    given.has_text_N[3] = False
    without_image = RidgeData(**{**vars(given), "images_ID": given.images_ID[:-1], "owner_I": given.owner_I[:-1]})
    ridge = fit_ridge(without_image, seed=0)
    expected_ND, owner_N = _starts(without_image, ridge, ridge.text_share)
    config = AdaptorConfig(patch_dim=4, text_dim=L, embedding_dim=D, layers=0, start="image")
    adaptor = Adaptor(config).eval()
    ridge.start(adaptor)
    found_ND = adaptor(
        torch.zeros(ENTITIES, 1, 4),
        torch.arange(ENTITIES) < ENTITIES - 1,
        torch.from_numpy(given.texts_NL)[:, None],
        torch.from_numpy(given.has_text_N)[:, None],
        torch.from_numpy(given.images_ID),
    )
    np.testing.assert_allclose(found_ND.detach().numpy()[owner_N], expected_ND, atol=1e-5)
