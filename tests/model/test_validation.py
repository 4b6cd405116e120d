from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.lines import Rejected, RejectLog
from model.adaptor import Adaptor, AdaptorConfig
from model.data import ImageSource, Pair, load_entities
from model.encoders import open_image_encoder, open_text_encoder
from model.features import FeatureStore, KeyedPair
from model.validation import is_better, measure, right_answers


def test_seen_unseen_and_their_harmonic_mean_by_hand() -> None:
    correct = np.array([True, True, False, True, False, False, False, True])
    split = [True, True, True, True, False, False, False, None]
    accuracy = measure(correct, split)
    assert (accuracy.top1, accuracy.seen, accuracy.unseen, accuracy.hm) == (0.5, 0.75, 0.0, 0.0)
    correct[4] = True
    accuracy = measure(correct, split)
    assert accuracy.hm == pytest.approx(2 * (3 / 4) * (1 / 3) / (3 / 4 + 1 / 3))
    assert accuracy.rank() == accuracy.hm


def test_one_split_alone_has_no_harmonic_mean() -> None:
    accuracy = measure(np.array([True, False]), [True, True])
    assert (accuracy.seen, accuracy.unseen, accuracy.hm, accuracy.rank()) == (0.5, None, None, 0.5)


def test_better_means_better_than_chance() -> None:
    """Eight queries more are better if none is lost, and chance if eighteen are gained and ten lost."""
    seen = [True] * 30 + [False] * 30
    start = np.zeros(60, bool)
    start[:10] = True
    gained = start.copy()
    gained[22:30] = True
    assert is_better(gained, start, seen)
    noisy = gained.copy()
    noisy[12:22], noisy[:10] = True, False
    assert not is_better(noisy, start, seen)
    assert not is_better(start, start, seen)
    assert not is_better(start, gained, seen)


@pytest.mark.parametrize(
    ("split", "seen"), [("val_seen", True), ("val_unseen", False), ("test_unseen", False), ("train", None)]
)
def test_the_end_of_a_splits_name_says_seen_or_unseen(split: str, seen: bool | None) -> None:
    image = ImageSource(image="x", line=1, record="")
    assert Pair(data_id="1", entity_id="Q1", data_split=split, image=image).seen is seen


def unexpected(rejected: Rejected) -> None:
    pytest.fail(rejected.reason)


def test_an_entity_is_found_by_its_best_image(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    """An untrained adaptor returns the image's embedding, so each of an entity's images finds it."""
    store = FeatureStore(tmp_path / "cache", open_image_encoder(tiny_spec), open_text_encoder(text_spec, max_tokens=16))
    entities = store.entity_keys(
        load_entities(dataset.catalog, None, RejectLog(tmp_path / "rejected.jsonl")), unexpected
    )
    adaptor = Adaptor(AdaptorConfig(patch_dim=24, text_dim=16, embedding_dim=24, width=16, heads=2)).train()
    queries = [KeyedPair(query=key, entity=row) for row, entity in enumerate(entities) for key in entity.images]
    wrong = [replace(each, entity=(each.entity + 1) % len(entities)) for each in queries]
    ((found, not_found),) = right_answers(adaptor, store, entities, [queries, wrong], torch.device("cpu"), (1.0,))
    assert len(found) == 22
    assert found.all()
    assert adaptor.training
    assert not not_found.any()
