from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.errors import CatalogError
from core.jsonl import RejectLog
from model.data import load_entities, load_pairs


def write(path: Path, *rows: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_images_lie_beside_the_pairs_or_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "a.png").write_bytes(b"x")
    pairs = write(tmp_path / "p.jsonl", {"data_id": "1", "image": "a.png", "entity_id": "Q1", "data_split": "train"})
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert load_pairs(pairs, None, rejects)[0].image.path == tmp_path / "a.png"
    assert load_pairs(pairs, tmp_path / "images", rejects)[0].image.path == tmp_path / "images" / "a.png"
    assert rejects.count == 0


def test_an_entity_outlives_its_bad_images(tmp_path: Path) -> None:
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
    assert [image.path for image in first.images] == [tmp_path / "a.png"]
    assert (second.entity_id, second.images, second.text) == ("Q2", (), "")
    reasons = [json.loads(line)["reason"] for line in rejects.path.read_text().splitlines()]
    assert len(reasons) == rejects.count == 3
    assert any("URL" in reason for reason in reasons)


def test_only_the_entities_asked_for(tmp_path: Path) -> None:
    catalog = write(tmp_path / "c.jsonl", *({"entity_id": f"Q{n}", "title": "T"} for n in range(5)))
    rejects = RejectLog(tmp_path / "rejected.jsonl")
    assert [entity.entity_id for entity in load_entities(catalog, None, rejects, only={"Q3", "Q1"})] == ["Q1", "Q3"]
    with pytest.raises(CatalogError, match="none of the entities"):
        load_entities(catalog, None, rejects, only={"Q9"})
