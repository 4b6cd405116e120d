"""OVEN's annotation files as they are released."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.errors import CatalogError
from core.jsonl import RejectLog
from model.data import OVEN_TABLE, load_pairs


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
    """Images as the table lists them (1), as the snapshot holds them (2, 400000), and none (3, 4, 5)."""
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


def test_the_table_may_be_named_or_lie_in_the_image_root(released: Path) -> None:
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


def test_a_table_that_is_none(released: Path) -> None:
    rejects = RejectLog(released / "rejected.jsonl")
    pairs, table = released / "oven_entity_val.jsonl", released / "other.csv"
    table.write_text("oven_00000001,a.jpg,extra\n")
    with pytest.raises(CatalogError, match="line 1 has 3 columns"):
        load_pairs(pairs, released / "images", rejects, ovenid2impath=table)
    with pytest.raises(CatalogError, match="cannot be read"):
        load_pairs(pairs, released / "images", rejects, ovenid2impath=released / "nowhere.csv")
