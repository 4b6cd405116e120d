"""One training step compared with loops written from the formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core.lines import Rejected, RejectLog
from model.adaptor import Adaptor, AdaptorConfig
from model.data import load_entities
from model.distributed import Group
from model.encoders import open_image_encoder, open_text_encoder
from model.features import EntityKeys, FeatureStore, KeyedPair
from model.losses import INITIAL_LOGIT_SCALE, draw_donors
from model.trainer import Batch, Trainer, TrainSettings, hide_tokens

CPU = torch.device("cpu")
CONFIG = AdaptorConfig(patch_dim=24, text_dim=16, embedding_dim=24, width=16, heads=2)


def unexpected(rejected: Rejected) -> None:
    pytest.fail(rejected.reason)


@pytest.fixture(scope="module")
def stored(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeatureStore, list[EntityKeys]]:
    """Entities with at most one image each, so the draw of an image is not random."""
    folder = tmp_path_factory.mktemp("features")
    store = FeatureStore(folder / "cache", open_image_encoder(tiny_spec), open_text_encoder(text_spec, max_tokens=16))
    entities = load_entities(dataset.catalog, None, RejectLog(folder / "rejected.jsonl"))
    keys = store.entity_keys(entities, unexpected)
    return store, [EntityKeys(images=entity.images[:1], text=entity.text) for entity in keys]


def trainer(stored: tuple[FeatureStore, list[EntityKeys]], **changes: Any) -> Trainer:
    """Return a trainer whose adaptor's output layer is not zero, so embeddings depend on texts."""
    settings = TrainSettings(**{"batch_size": 8, "modality_dropout": 0.0, "lr": 1e-3, "warmup": 0.0, **changes})
    made = Trainer(
        config=CONFIG, settings=settings, store=stored[0], entities=stored[1], steps=10, device=CPU, group=Group()
    )
    torch.nn.init.normal_(made.adaptor.out.weight, generator=torch.Generator().manual_seed(1))
    return made


# Entity 3 has no text, entity 11 no image, and entity 5 is repeated.
ROWS = [0, 3, 5, 5, 8, 11]


# Donors come from the same cluster. Entity 8 and one pair of entity 5 are without one.
CLUSTERS = [0, 0, 0, 1, 2, 0]


def batch_of(entities: list[EntityKeys], rows: list[int] = ROWS) -> Batch:
    """Pair each entity with another entity's image, so the batch is not trivial."""
    pairs = [KeyedPair(query=entities[(row + 1) % 11].images[0], entity=row) for row in rows]
    return Batch(pairs, np.array(CLUSTERS if rows == ROWS else [0] * len(rows)))


@pytest.mark.parametrize("whose", ["own", "other"])
def test_the_loss_with_synthesis_equals_the_formula(stored: tuple[FeatureStore, list[EntityKeys]], whose: str) -> None:
    store, entities = stored
    made = trainer(stored, hard_negatives="synthesis", n_sync=3, seed=4, synthetic_image=whose)
    twin = Adaptor(CONFIG)
    twin.load_state_dict(made.adaptor.state_dict())
    batch = batch_of(entities)
    images = [next(iter(entities[pair.entity].images), None) for pair in batch.pairs]
    texts = [entities[pair.entity].text for pair in batch.pairs]

    def embedding(image: bytes | None, text: bytes | None) -> torch.Tensor:
        with torch.no_grad():
            return twin(*store.batch([(image, text)], CPU))[0]  # type: ignore[no-any-return]

    # The step draws each pair's image and modality, then the donors.
    rng = np.random.default_rng(np.random.SeedSequence((4, 1, 0)))
    for image in images:
        if image is not None:
            rng.integers(1)
        rng.random()
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts)) if text is not None}
    text_B = np.array([-1 if text is None else numbers[text] for text in texts])
    donors_BS = draw_donors(np.array(ROWS), text_B, batch.cluster_B, 3, rng)

    total, replaced = 0.0, 0
    for i, pair in enumerate(batch.pairs):
        query = torch.from_numpy(store.query_embeddings([pair.query])[0])
        cosine = {j: float(query @ embedding(images[j], texts[j])) for j in range(6) if i == j or ROWS[i] != ROWS[j]}
        easiest = sorted((j for j in cosine if j != i), key=lambda j: cosine[j])
        for j in [i] if whose == "own" else easiest:
            for donor in donors_BS[j]:
                if donor == j or ROWS[donor] == ROWS[i] or images[j] is None:
                    continue
                synthetic = float(query @ embedding(images[j], texts[donor]))
                target = easiest.pop(0) if whose == "own" else j
                replaced += whose == "own" or synthetic > cosine[target]
                cosine[target] = synthetic if whose == "own" else max(cosine[target], synthetic)
        logits = {j: math.exp(INITIAL_LOGIT_SCALE * value) for j, value in cosine.items()}
        total -= math.log(logits[i] / sum(logits.values()))
    assert replaced > 0
    assert made.step([batch], synthesise=True) == pytest.approx(total / 6, rel=1e-4)


@pytest.mark.parametrize("whose", ["own", "other"])
def test_synthesis_raises_the_loss(stored: tuple[FeatureStore, list[EntityKeys]], whose: str) -> None:
    batch = batch_of(stored[1])
    plain, hard = (trainer(stored, synthetic_image=whose).step([batch], synthesise=each) for each in (False, True))
    assert hard > plain


def test_a_step_draws_one_of_the_views_as_the_query(stored: tuple[FeatureStore, list[EntityKeys]]) -> None:
    first, second = batch_of(stored[1], [0, 5]).pairs
    views = tuple(entity.images[0] for entity in stored[1][6:9])

    def losses(pair: KeyedPair, steps: int) -> set[float]:
        made = trainer(stored, lr=1e-12)
        batch = Batch([pair, second], np.zeros(2, np.int64))
        return {round(made.step([batch], synthesise=False), 5) for _ in range(steps)}

    expected = set.union(*(losses(replace(first, query=view), 1) for view in views))
    assert len(expected) == 3
    assert losses(replace(first, views=views), 30) == expected


def test_accumulation_averages_gradients(
    stored: tuple[FeatureStore, list[EntityKeys]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.trainer._GRADIENT_NORM", math.inf)

    def stepped(*rows: list[int]) -> tuple[float, torch.Tensor]:
        made = trainer(stored)
        loss = made.step([batch_of(stored[1], each) for each in rows], synthesise=False)
        assert made.steps_done == 1
        return loss, torch.cat([p.grad.flatten() for p in made.adaptor.parameters() if p.grad is not None])

    (first, first_gradient), (second, second_gradient) = stepped([0, 5, 8]), stepped([1, 2, 11])
    both, gradient = stepped([0, 5, 8], [1, 2, 11])
    assert both == pytest.approx((first + second) / 2)
    torch.testing.assert_close(gradient, (first_gradient + second_gradient) / 2)


def test_the_encoders_get_no_gradient(stored: tuple[FeatureStore, list[EntityKeys]]) -> None:
    store, entities = stored
    made = trainer(stored)
    made.step([batch_of(entities)], synthesise=True)
    modules = [store.image_encoder.module, store.text_encoder.model]  # type: ignore[attr-defined]
    frozen = [parameter for module in modules for parameter in module.parameters()]
    assert frozen
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    assert all(parameter.grad is not None for parameter in made.adaptor.parameters())


def test_tokens_are_hidden_at_the_given_share_but_never_all() -> None:
    torch.manual_seed(0)
    mask_BT = torch.ones(400, 20, dtype=torch.bool)
    mask_BT[0] = False
    mask_BT[1, 1:] = False
    hidden_BT = hide_tokens(mask_BT, 0.3)
    assert not (hidden_BT & ~mask_BT).any()
    assert 0.67 < hidden_BT[2:].float().mean() < 0.73
    assert hidden_BT.any(dim=1).tolist() == mask_BT.any(dim=1).tolist()
    assert hide_tokens(mask_BT, 0.99).any(dim=1).tolist() == mask_BT.any(dim=1).tolist()
    assert torch.equal(hide_tokens(mask_BT, 0.0), mask_BT)
    assert hide_tokens(mask_BT[:, :0], 0.5).shape == (400, 0)


def test_hidden_tokens_change_a_step(stored: tuple[FeatureStore, list[EntityKeys]]) -> None:
    batch = batch_of(stored[1])
    losses = [trainer(stored, text_mask=share).step([batch], synthesise=False) for share in (0.0, 0.5, 0.5)]
    assert losses[0] != losses[1] == losses[2]
