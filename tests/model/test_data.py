"""Pairs and entities from files, OVEN's annotations as released, balancing and catalog pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.errors import CatalogError
from core.lines import RejectLog
from model.data import (
    OVEN_TABLE,
    ImageSource,
    Pair,
    QueryEmbedding,
    balance_pairs,
    draw_entities,
    load_entities,
    load_pairs,
)
from model.features import EntityKeys, KeyedPair, catalog_pairs


def write(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_image_paths_are_relative_to_the_pairs_or_the_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "a.png").write_bytes(b"x")
    pairs = write(tmp_path / "p.jsonl", {"data_id": "1", "image": "a.png", "entity_id": "Q1", "data_split": "train"})
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert load_pairs(pairs, None, rejects)[0].image.path == tmp_path / "a.png"
    assert load_pairs(pairs, tmp_path / "images", rejects)[0].image.path == tmp_path / "images" / "a.png"
    assert rejects.count == 0


def test_an_entity_stays_without_its_bad_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    images = ["a.png", "gone.png", "https://example.org/x.png"]
    catalog = write(
        tmp_path / "c.jsonl",
        {"entity_id": "Q1", "title": "One", "images": images},
        {"entity_id": "Q2", "title": "Two"},
        {"title": "nobody"},
    )
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    first, second = load_entities(catalog, None, rejects)
    paths = (str(tmp_path / "a.png"), str(tmp_path / "gone.png"), "https://example.org/x.png")
    assert first.images == paths  # the last two are missing when they are read
    assert (second.entity_id, second.images, second.text) == ("Q2", (), "")
    reasons = [json.loads(line)["reason"] for line in rejects.path.read_text().splitlines()]
    assert len(reasons) == rejects.count == 1


def test_a_strange_pair_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    pair = {"data_id": "1", "image": "a.png", "entity_id": "Q1", "data_split": "train"}
    strange = [{"image": "\ud800.png"}, {"image": "x" * 300}, {"image": "\0"}, {"entity_id": "\ud800"}]
    pairs = write(tmp_path / "p.jsonl", pair, *({**pair, **each} for each in strange))
    with pairs.open("a") as file:
        file.write('{"data_id": ' + "[" * 900 + "]" * 900 + "}\n" + "[" * 100_000 + "\n")
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert len(load_pairs(pairs, None, rejects)) == 1
    assert [json.loads(line)["line"] for line in rejects.path.read_text().splitlines()] == [2, 3, 4, 5, 6, 7]


def test_rows_with_an_embedding_are_read_where_they_are_of_use(tmp_path: Path) -> None:
    row = {"data_id": "1", "embedding": [0.5, 1, -2e-3], "entity_id": "Q1", "data_split": "feedback", "encoder": "abc"}
    strange = [
        {"embedding": "0.5"}, {"embedding": [0.5, "1"]}, {"embedding": [True]}, {"embedding": [10**400]},
        {"encoder": 5}, {"entity_id": ""}, {"data_split": None}, {"embedding": None},
    ]  # fmt: skip
    (tmp_path / "a.png").write_bytes(b"x")
    pictured = {**row, "image": "a.png"}
    pairs = write(tmp_path / "p.jsonl", row, *({**row, **each} for each in strange), pictured)
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    embedded, plain = load_pairs(pairs, None, rejects, embeddings=True)
    assert embedded.embedding == QueryEmbedding(values=(0.5, 1.0, -0.002), encoder="abc")
    assert (plain.embedding, plain.image.path, embedded.image.line) == (None, tmp_path / "a.png", 1)
    assert [json.loads(line)["line"] for line in rejects.path.read_text().splitlines()] == list(range(2, 10))
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert [pair.image.line for pair in load_pairs(pairs, None, rejects)] == [10]
    reasons = [json.loads(line)["reason"] for line in rejects.path.read_text().splitlines()]
    assert len(reasons) == 9
    assert all("training needs images" in reason for reason in reasons)


def test_only_selected_entities(tmp_path: Path) -> None:
    catalog = write(tmp_path / "c.jsonl", *({"entity_id": f"Q{n}", "title": "T"} for n in range(5)))
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert [entity.entity_id for entity in load_entities(catalog, None, rejects, only={"Q3", "Q1"})] == ["Q1", "Q3"]
    with pytest.raises(CatalogError, match="none of the entities"):
        load_entities(catalog, None, rejects, only={"Q9"})


def test_entities_with_an_image_are_drawn_besides_those_of_the_pairs(tmp_path: Path) -> None:
    rows = ({"entity_id": f"Q{n}", "title": "T", "images": ["a.png"] * (n % 2)} for n in range(40))
    catalog = write(tmp_path / "c.jsonl", *rows)
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    entities, candidates = draw_entities(catalog, None, rejects, count=5, always={"Q2", "Q3"})
    assert candidates == 19
    numbers = [int(entity.entity_id[1:]) for entity in entities]
    assert numbers == sorted(numbers)
    assert len(numbers) == 7
    assert {2, 3} < set(numbers)
    assert sum(number % 2 == 0 for number in numbers) == 1  # only the one that is named
    assert (entities, candidates) == draw_entities(catalog, None, rejects, count=5, always={"Q2", "Q3"})


def row(number: int, split: str = "val_seen") -> dict[str, object]:
    return {
        "data_id": f"oven_entity_val_{number}",
        "image_id": f"oven_{number:08d}",
        "question": "what is shown?",
        "entity_id": f"Q{number}",
        "entity_text": "One",
        "data_split": split,
    }


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Images at the table's path (1), at the snapshot's path (2, 400000), and missing (3, 4, 5)."""
    root = tmp_path / "images"
    for name in ("inat/a/one.jpg", "oven_images/00/oven_00000002.jpg", "oven_images/00/oven_00400000.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (tmp_path / "outside.jpg").write_bytes(b"x")
    table = {1: "inat/a/one.jpg", 2: "/inat/b/two.jpg", 400000: "coco/x.png", 3: "inat/c.jpg", 4: "../outside.jpg"}
    lines = "".join(f"oven_{number:08d},{path}\n" for number, path in table.items())
    (tmp_path / OVEN_TABLE).write_text(lines, encoding="utf-8")
    rows = [row(1), row(2, "val_unseen"), row(400000), row(3), row(4), row(5), {**row(1), "entity_id": None}]
    (tmp_path / "oven_entity_val.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def test_rows_find_their_images_by_id(released: Path) -> None:
    rejects = RejectLog(released / "rejected.jsonl")
    pairs = load_pairs(released / "oven_entity_val.jsonl", released / "images", rejects)
    assert [(pair.data_id, pair.entity_id, pair.seen) for pair in pairs] == [
        ("oven_entity_val_1", "Q1", True),
        ("oven_entity_val_2", "Q2", False),
        ("oven_entity_val_400000", "Q400000", True),
    ]
    names = [pair.image.path.relative_to(released / "images").as_posix() for pair in pairs]
    assert names == ["inat/a/one.jpg", "oven_images/00/oven_00000002.jpg", "oven_images/00/oven_00400000.png"]
    rejected = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert [each["line"] for each in rejected] == [4, 5, 6, 7]
    assert "image_id" in rejected[3]["reason"]


def test_the_table_can_be_named_or_in_the_image_root(released: Path) -> None:
    elsewhere = released / "tables" / "ids.csv"
    elsewhere.parent.mkdir()
    (released / OVEN_TABLE).rename(elsewhere)
    rejects = RejectLog(released / "rejected.jsonl")
    pairs = released / "oven_entity_val.jsonl"
    assert len(load_pairs(pairs, released / "images", rejects, ovenid2impath=elsewhere)) == 3
    with pytest.raises(CatalogError, match="--ovenid2impath"):
        load_pairs(pairs, released / "images", rejects)
    elsewhere.rename(released / "images" / OVEN_TABLE)
    assert len(load_pairs(pairs, released / "images", rejects)) == 3


def test_invalid_tables(released: Path) -> None:
    rejects = RejectLog(released / "rejected.jsonl")
    pairs, table = released / "oven_entity_val.jsonl", released / "other.csv"
    table.write_text("oven_00000001,a.jpg,extra\n")
    with pytest.raises(CatalogError, match="#0 has length 3"):
        load_pairs(pairs, released / "images", rejects, ovenid2impath=table)
    with pytest.raises(CatalogError, match="cannot be read"):
        load_pairs(pairs, released / "images", rejects, ovenid2impath=released / "nowhere.csv")


def labelled(*entity_ids: str) -> list[Pair]:
    image = ImageSource(image="x", line=1, record="")
    return [
        Pair(data_id=str(number), entity_id=entity_id, data_split="train", image=image)
        for number, entity_id in enumerate(entity_ids)
    ]


def test_balancing_limits_pairs_per_entity_and_keeps_their_order() -> None:
    pairs = labelled(*["a"] * 50, "b", *["c"] * 3, *["a"] * 50)
    balanced = balance_pairs(pairs, 3, seed=1)
    assert Counter(pair.entity_id for pair in balanced) == {"a": 3, "b": 1, "c": 3}
    assert [int(pair.data_id) for pair in balanced] == sorted(int(pair.data_id) for pair in balanced)
    assert balance_pairs(pairs, 3, seed=1) == balanced
    assert {pair.data_id for seed in range(20) for pair in balance_pairs(pairs, 3, seed) if pair.entity_id == "a"} > {
        pair.data_id for pair in balanced if pair.entity_id == "a"
    }
    assert balance_pairs(pairs, 200, seed=0) == pairs


def test_catalog_pairs_need_another_image_or_a_text() -> None:
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


def test_catalog_pairs_fill_up_to_the_limit() -> None:
    entities = [EntityKeys(images=(b"a", b"b", b"c"), text=b"t") for _ in range(3)]
    made = catalog_pairs(entities, Counter({0: 2, 1: 5}), 3)
    assert made == [KeyedPair(query=b"a", entity=0), *(KeyedPair(query=q, entity=2) for q in (b"a", b"b", b"c"))]
