"""`python -m evaluation.regions`: pages that show several things."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from core.statistics import wilson_interval
from evaluation.regions import MAX_THINGS, Pages, main

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def queries(tmp_path) -> list[tuple[str, Path]]:
    """Squares and bars of one colour each, which no texture has."""
    queries = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40 + 20 * number, 60), (255, 0, 40 * number)).save(path)
        queries.append((f"Q{number}", path))
    return queries


def test_pages_show_different_things_at_their_size_without_overlaps(queries, tmp_path):
    Image.new("RGB", (30, 50), "green").save(tmp_path / "background.jpg")
    pages = Pages(queries, [tmp_path / "background.jpg"], seed=0)
    for things in range(1, MAX_THINGS + 1):
        page, entity_ids = pages.draw(things, (0.1, 0.6))
        assert len(set(entity_ids)) == things
        pixels = np.asarray(page)
        for entity_id in entity_ids:
            colour = (255, 0, 40 * int(entity_id[1:]))
            share = (pixels == colour).all(axis=2).mean()
            assert 0.09 < share < 0.61, "all of it is visible"


def test_equal_seeds_give_equal_pages(queries):
    drawn = [Pages(queries, [], seed=3).draw(3, (0.1, 0.3)) for _ in range(2)]
    assert drawn[0][1] == drawn[1][1]
    assert drawn[0][0].tobytes() == drawn[1][0].tobytes()


def test_the_command_prints_figures_for_each_number_of_things(tmp_path):
    rows = []
    for number in range(MAX_THINGS):
        with Image.open(DEMO / "example.jpg") as example:
            example.rotate(90 * number).save(tmp_path / f"{number}.png")
        rows.append(
            {"data_id": str(number), "image": f"{number}.png", "entity_id": f"flag:{number}", "data_split": "x"}
        )
    rows[0]["entity_id"] = "flag:SE"
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--bundle", str(DEMO / "bundle"), "--queries", str(tmp_path / "queries.jsonl"), "--pages", "2"]
    out = tmp_path / "regions.json"
    done = CliRunner().invoke(main, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == out.read_text()
    figures = json.loads(out.read_text())["figures"]
    assert [*figures] == ["1", "2", "3", "4", "5", "1 on 10 to 30 %, top-1"]
    assert figures["5"]["recall"] == 20, "only one of the five has its own entity, and it is on every page of five"
    assert figures["5"]["recall_interval"] == [pytest.approx(100 * bound) for bound in wilson_interval(2, 10)]
    assert 0 <= figures["5"]["precision_interval"][0] <= figures["5"]["precision"] <= 100


def test_queries_without_rows_are_refused(tmp_path):
    (tmp_path / "queries.jsonl").write_text("")
    arguments = ["--bundle", str(DEMO / "bundle"), "--queries", str(tmp_path / "queries.jsonl")]
    assert "has no queries" in str(CliRunner().invoke(main, arguments).exception)
