"""`wikiclip evaluate` and `wikiclip bench` as a user runs them, on a small bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _wikiclip(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wikiclip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def queries(small_images: dict[str, bytes], tmp_path: Path) -> Path:
    """Each entity's own image, half of them in an unseen split, then a broken image and a line that is no query."""
    rows = []
    for position, (entity_id, data) in enumerate(small_images.items()):
        name = f"{position}.png"
        (tmp_path / name).write_bytes(data)
        split = "test_unseen" if position % 2 else "test_seen"
        rows.append({"data_id": f"q{position}", "image": name, "entity_id": entity_id, "data_split": split})
    (tmp_path / "broken.png").write_bytes(next(iter(small_images.values()))[:40])
    rows.append(
        {"data_id": "broken", "image": "broken.png", "entity_id": rows[0]["entity_id"], "data_split": "test_seen"}
    )
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return path


def test_evaluate_answers_every_query_and_counts_the_broken_one_as_wrong(
    small_bundle: Path, small_images: dict[str, bytes], queries: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.jsonl"
    done = _wikiclip(
        "evaluate", "--bundle", small_bundle, "--queries", queries, "--out", out, "--json", "--batch-size", 5
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    count = len(small_images)
    assert figures["queries"] == count + 1
    assert figures["unseen"] == 100.0
    seen = (count + 1) // 2
    assert figures["seen"] == pytest.approx(100 * seen / (seen + 1))
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["data_id"] for row in predictions] == [f"q{i}" for i in range(count)] + ["broken"]
    assert predictions[-1] == {"data_id": "broken", "pred_entity_id": ""}
    assert [row["pred_entity_id"] for row in predictions[:-1]] == list(small_images)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in rejected) == [count + 1, count + 2]


def test_evaluate_says_what_is_missing(small_bundle: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    done = _wikiclip("evaluate", "--bundle", small_bundle, "--queries", missing, "--out", tmp_path / "p.jsonl")
    assert done.returncode == 2
    assert str(missing) in done.stderr.splitlines()[-1]
    assert not (tmp_path / "p.jsonl").exists()


def test_evaluate_reads_ovens_own_files(small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path) -> None:
    images, table = tmp_path / "images", tmp_path / "ids.csv"
    images.mkdir()
    rows = []
    with table.open("w") as file:
        for number, (entity_id, data) in enumerate(list(small_images.items())[:4]):
            image_id = f"oven_{number:08d}"
            (images / f"{number}.png").write_bytes(data)
            file.write(f"{image_id},{number}.png\n")
            row = {"data_id": f"oven_entity_val_{number}", "image_id": image_id, "question": "what is this?"}
            rows.append({**row, "entity_id": entity_id, "entity_text": "", "data_split": "val_seen"})
    queries = tmp_path / "oven_entity_val.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--image-root", images, "--ovenid2impath", table, "--out", tmp_path / "predictions.jsonl"]
    done = _wikiclip("evaluate", "--bundle", small_bundle, "--queries", queries, *where, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["queries"], figures["rejected"], figures["seen"]) == (4, 0, 100.0)


@pytest.mark.parametrize("name", ["service", "index"])
def test_bench_prints_one_object_with_what_it_ran_on(small_bundle: Path, tmp_path: Path, name: str) -> None:
    done = _wikiclip("bench", name, "--smoke", "--json", "--bundle", small_bundle, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome.keys() >= {"hardware", "commit", "settings", "figures"}
    if name == "service":
        assert outcome["figures"]["service"]["p50_ms"] > 0
    else:
        assert outcome["figures"]["batch_64_queries_per_s"] > 0
    assert len(list(tmp_path.glob(f"*/{name}.json"))) == 1
