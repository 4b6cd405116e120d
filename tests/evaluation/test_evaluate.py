"""`wikiclip evaluate` as a user runs it, on a small bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from core.runtime import onnxruntime
from evaluation.cli import evaluate
from evaluation.evaluate import hold_out
from index.bundle import Bundle
from index.manifest import MANIFEST_FILE, Manifest
from tests.commands import run_wikiclip
from tests.conftest import FIXTURE_ENTITIES, add_remembered, draw_png, embed, pool_by_mean


@pytest.fixture
def serve() -> Any:
    from tests.service.conftest import served

    return served


@pytest.fixture
def queries(small_images: dict[str, bytes], tmp_path: Path) -> Path:
    """Write queries: each entity's own image, half of them unseen, a broken image, a missing one and a bad line."""
    rows = []
    for position, (entity_id, data) in enumerate(small_images.items()):
        name = f"{position}.png"
        (tmp_path / name).write_bytes(data)
        split = "test_unseen" if position % 2 else "test_seen"
        rows.append({"data_id": f"q{position}", "image": name, "entity_id": entity_id, "data_split": split})
    (tmp_path / "broken.png").write_bytes(next(iter(small_images.values()))[:40])
    for name in ("broken", "missing"):
        row = {"image": f"{name}.png", "entity_id": rows[0]["entity_id"], "data_split": "test_seen"}
        rows.append({"data_id": name, **row})
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return path


def test_evaluate_answers_every_query_and_counts_unreadable_ones_as_wrong(
    small_bundle: Path, small_images: dict[str, bytes], queries: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.jsonl"
    done = run_wikiclip(
        "evaluate", "--bundle", small_bundle, "--queries", queries, "--out", out, "--json", "--batch-size", 5
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    count = len(small_images)
    assert figures["queries"] == count + 2
    assert figures["unseen"] == 100.0
    seen = (count + 1) // 2
    assert figures["seen"] == pytest.approx(100 * seen / (seen + 2))
    low, high = figures["intervals"]["seen"]
    assert low < figures["seen"] < high
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["data_id"] for row in predictions] == [f"q{i}" for i in range(count)] + ["broken", "missing"]
    assert predictions[-1] == {"data_id": "missing", "pred_entity_id": ""}
    assert [row["pred_entity_id"] for row in predictions[:-2]] == list(small_images)
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in rejected) == [count + 1, count + 2, count + 3]
    references = [json.loads(line) for line in queries.read_text().splitlines()[:-1]]
    assert oven_scores(references, predictions) == pytest.approx(figures["oven"])


def oven_scores(references: list[dict[str, str]], predictions: list[dict[str, str]]) -> dict[str, float]:
    """Return what OVEN's evaluator computes from its two files: a mean per split, and their harmonic mean."""
    truth = {row["data_id"]: row for row in references}
    scores = {}
    for part in ("seen", "unseen"):
        rows = [row for row in predictions if truth[row["data_id"]]["data_split"].endswith(f"_{part}")]
        right = sum(row["pred_entity_id"] == truth[row["data_id"]]["entity_id"] for row in rows)
        scores[part] = 100 * right / len(rows)
    scores["hm"] = 2 / (1 / scores["seen"] + 1 / scores["unseen"])
    return scores


def test_feedback_is_evaluated_as_its_images_are(
    serve: Any, small_bundle: Path, small_images: dict[str, bytes], queries: Path, tmp_path: Path
) -> None:
    feedback = tmp_path / "feedback.jsonl"
    with serve(small_bundle, feedback_file=feedback) as client:
        for entity_id, data in small_images.items():
            given = {"Q140": "Q89"}.get(entity_id, entity_id)  # one is wrong
            answer = client.post(
                "/feedback", params={"entity_id": given}, content=data, headers={"Content-Type": "image/png"}
            )
            assert answer.status_code == 201
    rows = [json.loads(line) for line in feedback.read_text().splitlines()]
    bad = [
        {**rows[0], "encoder": "0" * 64}, {**rows[0], "embedding": rows[0]["embedding"][:-1]},
        {**rows[0], "embedding": [0.0] * 16}, {**rows[0], "embedding": "text"},
    ]  # fmt: skip
    with feedback.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    out = tmp_path / "out" / "predictions.jsonl"
    out.parent.mkdir()
    report, catalog = out.with_name("report.html"), tmp_path / "catalog.jsonl"
    asked = [json.loads(line) for line in queries.read_text().splitlines()[: len(small_images)]]
    records = ({"entity_id": each["entity_id"], "title": "A", "images": [each["image"]]} for each in asked)
    catalog.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = run_wikiclip(
        "evaluate", "--bundle", small_bundle, "--queries", feedback, "--out", out, "--report", report, "--json",
        "--catalog", catalog,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    count = len(small_images)
    assert (figures["queries"], figures["rejected"]) == (count, 4)
    for found in (figures, figures["untrained"]):
        assert found["recall"]["feedback"]["recall_at_1"] == pytest.approx(100 * (count - 1) / count, abs=0.01)
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert predictions == [
        {"data_id": row["data_id"], "pred_entity_id": entity_id}
        for row, entity_id in zip(rows, small_images, strict=True)
    ]
    rejected = [json.loads(line) for line in out.with_name("rejected.jsonl").read_text().splitlines()]
    assert {row["line"] for row in rejected} == {count + number for number in (1, 2, 3, 4)}
    reasons = " ".join(row["reason"] for row in rejected)
    for reason in ("by the encoder 000", "16 finite numbers", "not all of them 0", "a list of numbers"):
        assert reason in reasons
    assert "Lion" in report.read_text()
    feedback.write_text(json.dumps(bad[0]) + "\n")
    none = run_wikiclip("evaluate", "--bundle", small_bundle, "--queries", feedback, "--out", out)
    assert (none.returncode, "no usable query" in none.stderr) == (2, True)


def test_held_out_entities_are_unknown_and_never_found(
    small_bundle: Path, small_images: dict[str, bytes], queries: Path, tmp_path: Path
) -> None:
    out, report = tmp_path / "predictions.jsonl", tmp_path / "report.html"
    done = run_wikiclip(
        "evaluate", "--bundle", small_bundle, "--queries", queries, "--out", out, "--leave-out", "0.5",
        "--report", report, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    bundle = hold_out(Bundle.open(small_bundle), 0.5)
    with bundle.store() as store:
        left_out = {entity.entity_id for entity in store.by_rows(sorted(bundle.held_out))}
    assert 0 < figures["left_out"] == len(left_out) < 12
    predicted = {
        json.loads(line)["data_id"]: json.loads(line)["pred_entity_id"] for line in out.read_text().splitlines()
    }
    for position, entity_id in enumerate(small_images):
        assert (predicted[f"q{position}"] == entity_id) == (entity_id not in left_out)
    assert left_out.isdisjoint(predicted.values())
    asked = [json.loads(line)["entity_id"] for line in queries.read_text().splitlines()[:-1]]
    assert figures["unknown"] == sum(entity_id in left_out for entity_id in asked)
    assert figures["auroc"] > 0.9
    html = report.read_text()
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)", html) == []
    assert "@import" not in html
    assert "Confusions that cost most" in html


@pytest.mark.parametrize("remembers", [False, True])
def test_a_holdout_search_returns_the_other_entities_in_order(
    small_bundle: Path, tmp_path: Path, remembers: bool
) -> None:
    if remembers:
        small_bundle = Path(shutil.copytree(small_bundle, tmp_path / "remembers"))
        add_remembered(small_bundle, range(12), handicap=0.0)
    bundle = hold_out(Bundle.open(small_bundle), 0.5)
    queries_BD = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    rows_BK, scores_BK = bundle.index().search(queries_BD, 20)
    all_rows, all_scores = Bundle.open(small_bundle).index().search(queries_BD, 12)
    for query in range(6):
        left = [place for place in range(12) if all_rows[query, place] not in bundle.held_out]
        assert rows_BK[query].tolist() == all_rows[query, left].tolist() + [-1] * (20 - len(left))
        assert scores_BK[query, : len(left)] == pytest.approx(all_scores[query, left], abs=1e-6)


def test_a_missing_query_file_is_an_error(small_bundle: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.jsonl"
    done = run_wikiclip("evaluate", "--bundle", small_bundle, "--queries", missing, "--out", tmp_path / "p.jsonl")
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
            split = "query" if number == 3 else "entity"
            row = {"data_id": f"oven_{split}_val_{number}", "image_id": image_id, "question": "what is this?"}
            rows.append({**row, "entity_id": entity_id, "entity_text": "", "data_split": "val_seen"})
    queries = tmp_path / "oven_entity_val.jsonl"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--image-root", images, "--ovenid2impath", table, "--out", tmp_path / "predictions.jsonl"]
    done = run_wikiclip("evaluate", "--bundle", small_bundle, "--queries", queries, *where, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["queries"], figures["rejected"], figures["seen"]) == (4, 0, 100.0)
    assert f"1 of 4 rows of {queries} are of OVEN's query split" in done.stderr


@pytest.mark.parametrize(("pooling", "left_out"), [("nearest", 0.0), ("mean", 0.3)])
def test_the_untrained_encoder_is_measured_on_the_images_of_the_catalog(
    small_bundle: Path, tmp_path: Path, pooling: str, left_out: float
) -> None:
    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    if pooling == "mean":
        pool_by_mean(bundle)
    held_out = hold_out(Bundle.open(bundle), left_out).held_out
    session = onnxruntime.InferenceSession(bundle / "image_encoder.onnx", providers=["CPUExecutionProvider"])
    lines, images = [json.dumps({"entity_id": "not in the bundle", "title": "x", "images": ["query_0.png"]})], {}
    for row, entity in reversed(list(enumerate(FIXTURE_ENTITIES))):  # the rows of a catalog need not be the bundle's
        names = []
        for number in range(3 if entity.images else 0):  # other images than those of the bundle
            data = draw_png(seed=5000 + 100 * row + number)
            names.append(f"{row}_{number}.png")
            (tmp_path / names[-1]).write_bytes(data)
            images.setdefault(row, []).append(embed(session, data))
        names += ["missing.png"] * (row == 0)
        lines.append(json.dumps({"entity_id": entity.entity_id, "title": entity.title, "images": names}))
    (tmp_path / "catalog.jsonl").write_text("\n".join(lines))
    rows, queries, ranks = [], [], {True: [], False: []}
    for number in range(60):
        data, own = draw_png(seed=9000 + number), number % 12
        (tmp_path / f"query_{number}.png").write_bytes(data)
        split = {"data_split": "test_seen" if number % 3 else "test_unseen"}
        queries.append({"data_id": str(number), "image": f"query_{number}.png", **split})
        queries[-1]["entity_id"] = FIXTURE_ENTITIES[own].entity_id
        query_D = embed(session, data)
        scores = {}
        for row, images_ID in images.items():
            mean_D = np.mean(images_ID, axis=0)
            cosines = [each_D @ query_D for each_D in images_ID]
            scores[row] = mean_D @ query_D / np.linalg.norm(mean_D) if pooling == "mean" else max(cosines)
        rows = sorted((row for row in scores if row not in held_out), key=lambda row: -scores[row])
        if own not in held_out:
            ranks[bool(number % 3)].append(rows.index(own) + 1 if own in rows else 99)
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    files = {
        "--queries": "queries.jsonl",
        "--catalog": "catalog.jsonl",
        "--out": "out.jsonl",
        "--report": "report.html",
    }
    arguments = [each for option, name in files.items() for each in (option, str(tmp_path / name))]
    arguments += ["--leave-out", str(left_out)] if left_out else []
    done = CliRunner().invoke(evaluate, ["--bundle", str(bundle), *arguments, "--json"], catch_exceptions=False)
    figures = json.loads(done.stdout)
    untrained = figures["untrained"]
    for name, part in (("seen", ranks[True]), ("unseen", ranks[False]), ("all", ranks[True] + ranks[False])):
        for k in (1, 5, 10):
            expected = 100 * np.mean([rank <= k for rank in part])
            assert untrained["recall"][name][f"recall_at_{k}"] == pytest.approx(expected, abs=0.01)
    assert 0 < untrained["seen"] < 100
    ratio = untrained["ratios"]["seen"]
    assert ratio["ratio"] == pytest.approx(figures["seen"] / untrained["seen"], abs=0.001)
    assert ratio["interval"][0] < ratio["ratio"] < ratio["interval"][1]
    assert untrained["unknown"] == figures["unknown"] == 5 * len(held_out)
    assert f"1 image(s) of {tmp_path / 'catalog.jsonl'} cannot be used" in done.stderr
    assert "multiple of those without training: seen" in (tmp_path / "report.html").read_text()


def test_a_trained_bundle_hints_at_the_comparison(small_bundle: Path, queries: Path, tmp_path: Path) -> None:
    untrained = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    manifest = Manifest.read(untrained / MANIFEST_FILE)
    manifest.model_copy(update={"model": {**manifest.model, "text_encoder": None}}).write(untrained / MANIFEST_FILE)
    for bundle in (small_bundle, untrained):
        files = ["--queries", str(queries), "--out", str(tmp_path / "out.jsonl")]
        done = CliRunner().invoke(evaluate, ["--bundle", str(bundle), *files], catch_exceptions=False)
        assert ("give --catalog to compare" in done.stderr) == (bundle == small_bundle)
        assert "without training" not in done.stdout
