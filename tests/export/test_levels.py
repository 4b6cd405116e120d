"""Fitting the level model: of the levels that are chosen, nine in ten are right, and more queries have one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from export.levels import add_level_model
from export.queries import LabelledSearch
from index.calibration import CANDIDATES, Calibration, background
from index.levels import most_specific
from index.store import EntityStore, StoredEntity, write_store
from index.types import TypeParents

ENTITIES, TYPES, DIM = 240, 24, 24
PLAIN = Calibration(slope=20.0, none_offset=0.0, none_slope=0.0, abstain_below=0.5, queries=1, correct=1, unknown=0)


def unit(vectors: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EntityStore]:
    """Entities of 24 types, three of which have a parent in common."""
    path = tmp_path_factory.mktemp("store") / "entities.sqlite"
    entities = (
        StoredEntity(
            row=row, entity_id=f"Q{row}", title="Thing", types=(f"type {row % TYPES}",), titles={}, description=None,
            url=None, symbol=None, image_count=1, has_text=False,
        )
        for row in range(ENTITIES)
    )  # fmt: skip
    parents = [TypeParents(type=f"type {each}", parents=(f"group {each // 3}", "thing")) for each in range(TYPES)]
    write_store(path, ((each, None) for each in entities), parents)
    with EntityStore(path) as opened:
        yield opened


def searched(store: EntityStore, rows: npt.NDArray[Any], *, seed: int) -> LabelledSearch:
    """Four queries for each of these rows: entities of one type are alike."""
    rng = np.random.default_rng(1)
    centres = unit(rng.normal(size=(TYPES, DIM)))
    catalog_ED = unit(centres[np.arange(ENTITIES) % TYPES] + 0.8 * unit(rng.normal(size=(ENTITIES, DIM))))
    own_N = np.repeat(rows, 4)
    noise_N1 = np.random.default_rng(seed).uniform(0.2, 1.6, (len(own_N), 1))
    queries_ND = unit(catalog_ED[own_N] + noise_N1 * unit(np.random.default_rng(seed).normal(size=(len(own_N), DIM))))
    scores_NE = queries_ND @ catalog_ED.T
    order_NF = np.argsort(-scores_NE, axis=1, kind="stable")[:, : CANDIDATES + 1]
    return LabelledSearch(
        own_N=own_N,
        group_N=own_N,
        rows_NF=order_NF,
        scores_NF=np.take_along_axis(scores_NE, order_NF, axis=1),
        embeddings_ND=queries_ND.astype(np.float32),
    )


def test_nine_in_ten_of_the_levels_chosen_are_right_on_other_entities(store: EntityStore) -> None:
    calibration = add_level_model(PLAIN, searched(store, np.arange(0, ENTITIES, 2), seed=2), store)
    assert calibration.level is not None
    found = searched(store, np.arange(1, ENTITIES, 2), seed=3)
    answered, right, entities = 0.0, 0.0, 0.0
    sizes = []
    for own, rows, scores in zip(found.own_N.tolist(), found.rows_NF.tolist(), found.scores_NF.tolist(), strict=True):
        for left_out, weight in ((False, 1.0), (True, 0.25)):
            kept = [each for each in zip(rows, scores, strict=True) if not (left_out and each[0] == own)][:CANDIDATES]
            types = [store.type_levels.of(record.types) for record in store.by_rows([row for row, _ in kept])]
            kept_scores = [score for _, score in kept]
            chosen = most_specific(calibration.level.levels(kept_scores, background(kept_scores), types))
            if chosen is None:
                continue
            answered += weight
            sizes.append(chosen[0].size)
            if chosen[0].key is None:
                entities += weight
                right += weight * (kept[0][0] == own)
            else:
                right += weight * (chosen[0].key in store.types.ancestors(store.by_rows([own])[0].types))
    assert 0.87 < right / answered < 1
    assert answered > 1.2 * entities > 0
    assert max(sizes) <= ENTITIES / 10


def test_without_types_only_an_entity_is_a_level(store: EntityStore, tmp_path: Path) -> None:
    entities = store.by_rows(range(len(store)))
    write_store(tmp_path / "plain.sqlite", ((replace(each, types=()), None) for each in entities))
    with EntityStore(tmp_path / "plain.sqlite") as plain:
        calibration = add_level_model(PLAIN, searched(plain, np.arange(ENTITIES), seed=2), plain)
        assert calibration.level is not None
        (level,) = list(calibration.level.levels([0.9, 0.1], 0.1, [(), ()]))
    assert (level[0].key, level[1] >= 0.9) == (None, True)


def test_too_few_queries_and_scores_without_meaning_give_no_model(store: EntityStore) -> None:
    assert add_level_model(PLAIN, searched(store, np.arange(4), seed=2), store) is PLAIN
    found = searched(store, np.arange(ENTITIES), seed=2)
    rng = np.random.default_rng(0)
    shuffled = replace(found, rows_NF=np.stack([rng.permutation(ENTITIES)[: CANDIDATES + 1] for _ in found.own_N]))
    assert add_level_model(PLAIN, shuffled, store) is PLAIN
    unknown = replace(found, own_N=np.full(len(found.own_N), -1))
    assert add_level_model(PLAIN, unknown, store) is PLAIN
