"""Folds over a tiny folder of photographs, and figures pooled over folds, small enough to work out by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from core.errors import UserError
from core.statistics import wilson_interval
from evaluation.photographs import Answer, Photographs, pool, split_folds, split_queries


@pytest.fixture
def photographs(tmp_path: Path) -> Photographs:
    """Six entities with five photographs or more, and one with a single one."""
    rows = []
    for number in range(7):
        images = [f"{number}_{photograph}.jpg" for photograph in range(1 if number == 3 else 5 + number % 2)]
        for image in images:
            (tmp_path / image).write_text(image)
        rows.append({"entity_id": f"e{number}", "title": f"Thing {number}", "images": images})
    (tmp_path / "entities.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Photographs(tmp_path)


def test_every_entity_is_unseen_once_and_no_query_is_trained_on(photographs: Photographs, tmp_path: Path) -> None:
    folds = split_folds(photographs.queried, 3)
    assert folds == [{"e0", "e4"}, {"e1", "e5"}, {"e2", "e6"}]
    for unseen in folds:
        pairs, queries = list(photographs.pairs(unseen)), list(photographs.queries(unseen))
        asked = Counter((row["entity_id"], row["data_split"]) for row in queries)
        assert asked == Counter(
            {(each, "test_unseen") if each in unseen else (each, "test_seen"): 4 if each in unseen else 2
             for each in photographs.queried}
        )  # fmt: skip
        assert Counter(row["entity_id"] for row in pairs) == dict.fromkeys(set(photographs.queried) - unseen, 2)
        assert not {row["image"] for row in pairs} & {row["image"] for row in queries}
        assert not any(row["image"].endswith("_0.jpg") for row in (*pairs, *queries))
        for asked, validation in split_queries(queries, unseen):
            assert sorted(row["data_id"] for row in (*asked, *validation)) == sorted(row["data_id"] for row in queries)
            assert not {row["entity_id"] for row in asked} & {row["entity_id"] for row in validation}
            assert {row["data_split"] for row in asked} == {"test_seen", "test_unseen"}
    photographs.write_catalog(tmp_path / "catalog.jsonl")
    catalog = [json.loads(line) for line in (tmp_path / "catalog.jsonl").read_text().splitlines()]
    assert [row["images"] for row in catalog] == [[str(tmp_path / f"{number}_0.jpg")] for number in range(7)]


def test_unusable_photographs_are_an_error(photographs: Photographs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few for 7 folds"):
        split_folds(photographs.queried, 7)
    (tmp_path / "2_4.jpg").unlink()
    with pytest.raises(UserError, match=r"line 3: .*2_4\.jpg cannot be read"):
        Photographs(tmp_path)


def answers(ranks: dict[tuple[str, int], tuple[int | None, ...]], *, seen: bool) -> list[Answer]:
    """One answer for each rank, which a fold gives, of an entity's photograph."""
    return [
        Answer(entity_id=entity_id, photograph=photograph, seen=seen, small=rank, full=None)
        for (entity_id, photograph), of_folds in ranks.items()
        for rank in of_folds
    ]


def test_answers_are_pooled_over_folds() -> None:
    unseen = answers({("c", 1): (1,), ("c", 2): (5,), ("d", 1): (6,), ("d", 2): (None,)}, seen=False)
    arm = answers({("a", 3): (1, 1), ("a", 4): (1, 2), ("b", 3): (1, None)}, seen=True) + unseen
    baseline = answers({("a", 3): (1, 1), ("a", 4): (2, 2), ("b", 3): (3, 1)}, seen=True) + unseen
    pooled = pool(arm, baseline, "small")
    seen = pooled["seen"]
    assert (seen["answers"], seen["pictures"], seen["top_1"], seen["recall_at_5"]) == (6, 3, 66.67, 83.33)
    assert seen["interval"] == pytest.approx([100 * bound for bound in wilson_interval(2, 3)], abs=0.01)
    # a has 3 right answers against 2, b has 1 against 1: resampling draws one of them twice, or both.
    assert (seen["ratio"], seen["ratio_interval"]) == (1.333, (1.0, 1.5))
    assert (pooled["unseen"]["top_1"], pooled["unseen"]["recall_at_5"]) == (25.0, 50.0)
    assert pooled["unseen"]["ratio"] == 1.0
    assert pooled["unseen"]["ratio_interval"] is None  # d alone has nothing right in either
    assert pool(arm, baseline, "full")["seen"]["ratio"] is None
