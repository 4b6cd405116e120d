from __future__ import annotations

from collections import Counter
from pathlib import Path

from model.data import ImageSource, Pair, balance_pairs
from model.features import EntityKeys, TrainingPair, catalog_pairs


def labelled(*entity_ids: str) -> list[Pair]:
    image = ImageSource(path=Path("x"), line=1, record="")
    return [
        Pair(data_id=str(number), entity_id=entity_id, data_split="train", image=image)
        for number, entity_id in enumerate(entity_ids)
    ]


def test_no_entity_has_more_pairs_than_the_limit_and_the_order_stays() -> None:
    pairs = labelled(*["a"] * 50, "b", *["c"] * 3, *["a"] * 50)
    kept = balance_pairs(pairs, 3, seed=1)
    assert Counter(pair.entity_id for pair in kept) == {"a": 3, "b": 1, "c": 3}
    assert [int(pair.data_id) for pair in kept] == sorted(int(pair.data_id) for pair in kept)
    assert balance_pairs(pairs, 3, seed=1) == kept
    assert {pair.data_id for seed in range(20) for pair in balance_pairs(pairs, 3, seed) if pair.entity_id == "a"} > {
        pair.data_id for pair in kept if pair.entity_id == "a"
    }
    assert balance_pairs(pairs, 200, seed=0) == pairs


def test_the_catalog_gives_pairs_where_something_is_left_for_the_entity() -> None:
    entities = [
        EntityKeys(images=(b"a", b"b"), text=b"t"),
        EntityKeys(images=(b"c",), text=b"t"),
        EntityKeys(images=(b"d",), text=None),
        EntityKeys(images=(b"e", b"f"), text=None),
        EntityKeys(images=(), text=b"t"),
        EntityKeys(images=(b"g", b"g"), text=None),
    ]
    expected = [(b"a", 0), (b"b", 0), (b"c", 1), (b"e", 3), (b"f", 3)]
    assert [(pair.query, pair.entity) for pair in catalog_pairs(entities, Counter(), None)] == expected


def test_pairs_of_the_catalog_fill_up_to_the_limit() -> None:
    entities = [EntityKeys(images=(b"a", b"b", b"c"), text=b"t") for _ in range(3)]
    made = catalog_pairs(entities, Counter({0: 2, 1: 5}), 3)
    assert made == [TrainingPair(query=b"a", entity=0), *(TrainingPair(query=q, entity=2) for q in (b"a", b"b", b"c"))]
