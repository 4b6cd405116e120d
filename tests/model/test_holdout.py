"""Entities and queries that training does not see."""

from __future__ import annotations

from model.features import EntityKeys, KeyedPair
from model.validation import hold_out


def entities(count: int, images: int = 1) -> list[EntityKeys]:
    keys = [tuple(b"%d.%d" % (row, number) for number in range(images)) for row in range(count)]
    return [EntityKeys(images=images_of_one, text=b"t") for images_of_one in keys]


def test_held_out_entities_are_in_no_pair_and_held_in_queries_are_not_trained_on() -> None:
    labelled = [KeyedPair(query=b"q%d.%d" % (row, number), entity=row) for row in range(20) for number in range(3)]
    added = [KeyedPair(query=b"%d.0" % row, entity=row) for row in range(25)]
    split = hold_out(labelled, added, entities(25), share=0.2, seed=0)
    assert split is not None
    assert len(split.held_out) == 4
    unseen = [pair for pair in split.validation if pair.seen is False]
    seen = [pair for pair in split.validation if pair.seen]
    assert {pair.entity for pair in unseen} == split.held_out
    assert len(unseen) == len(seen) == 12
    assert len({pair.entity for pair in seen} - split.held_out) == 12
    assert not {pair.entity for pair in split.pairs} & split.held_out
    assert len(split.pairs) == 60 + 25 - 12 - 4 - 12
    assert not {pair.query for pair in split.pairs} & {pair.query for pair in split.validation}
    assert split.entities == entities(25)
    assert hold_out(labelled, added, entities(25), share=0.2, seed=0) == split
    assert hold_out(labelled, added, entities(25), share=0.2, seed=1) != split


def test_without_labelled_pairs_a_query_leaves_the_catalog() -> None:
    catalog = entities(10, images=3)
    added = [KeyedPair(query=image, entity=row) for row, entity in enumerate(catalog) for image in entity.images]
    split = hold_out([], added, catalog, share=0.2, seed=0)
    assert split is not None
    assert len(split.held_out) == 2
    for pair in split.validation:
        assert pair.query not in split.entities[pair.entity].images
        assert split.entities[pair.entity].images
    assert sum(len(entity.images) for entity in split.entities) == 30 - len(split.validation)


def test_too_few_entities_or_no_share_hold_nothing_out() -> None:
    labelled = [KeyedPair(query=b"q%d" % row, entity=row) for row in range(5)]
    assert hold_out(labelled[:4], [], entities(4), share=0.2, seed=0) is None
    assert hold_out(labelled, [], entities(5), share=0.0, seed=0) is None
