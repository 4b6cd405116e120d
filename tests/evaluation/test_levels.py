"""Levels over a set of queries, against slow and obvious code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from evaluation.cli import evaluate
from evaluation.levels import THRESHOLDS, Step, level_steps, summarise_levels
from evaluation.metrics import AnsweredQuery, as_table, summarise
from index.bundle import Bundle
from index.levels import LevelModel, most_specific
from index.manifest import MANIFEST_FILE, Manifest
from index.store import EntityStore
from tests.conftest import add_type_parents, draw_png
from wikiclip.answers import Prediction

MODEL = LevelModel(slope=6.0, weights=(0.7, 1.0, 2.0, 0.0, -1.5, 0.0))


def prediction(rank: int, entity_id: str, types: tuple[str, ...], score: float, confidence: float = 0.5) -> Prediction:
    return Prediction(
        rank=rank, entity_id=entity_id, title=entity_id, score=score, confidence=confidence, description=None, url=None,
        symbol=None, types=types, has_thumbnail=False,
    )  # fmt: skip


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`small_bundle` with a level model, and types that may cover half of it."""
    monkeypatch.setattr("index.levels.MAX_SHARE", 0.5)
    folder = tmp_path / "levels"
    shutil.copytree(small_bundle, folder)
    add_type_parents(folder, {"fruit": ["organism"], "flag": ["emblem"], "brand": ["emblem"]})
    manifest = Manifest.read(folder / MANIFEST_FILE)
    calibration = {**(manifest.calibration or {}), "level": MODEL.to_dict()}
    manifest.model_copy(update={"calibration": calibration}).write(folder / MANIFEST_FILE)
    return folder


def test_the_steps_give_the_services_level_at_every_threshold(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    with EntityStore(bundle / "entities.sqlite") as store:
        entities = store.by_rows(range(len(store)))
        for _ in range(60):
            scores = sorted(rng.uniform(0, 1, 12).tolist(), reverse=True)
            drawn = [entities[row] for row in rng.permutation(12)]
            found = [
                prediction(rank, each.entity_id, each.types, score)
                for rank, (each, score) in enumerate(zip(drawn, scores, strict=True), 1)
            ]
            truth = drawn[int(rng.integers(12))]
            steps = level_steps(MODEL, store.type_levels, found, truth)
            background = sum(scores[1:10]) / 9
            types = [store.type_levels.of(each.types) for each in drawn[:10]]
            for threshold in (0.0, *THRESHOLDS):
                level = most_specific(MODEL.levels(scores[:10], background, types), threshold)
                step = next((each for each in steps if each.confidence >= threshold), None)
                if level is None:
                    assert step is None
                    continue
                right = {*store.types.ancestors(truth.types), *((None,) if drawn[0] is truth else ())}
                assert step == Step(pytest.approx(level[1]), level[0].size, level[0].key in right)
    assert level_steps(MODEL, store.type_levels, [], truth) == ()


def test_the_figures_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(1)
    answered = []
    for _ in range(400):
        sizes = np.cumsum(rng.integers(1, 9, int(rng.integers(0, 4))))
        confidences = np.sort(rng.uniform(0.3, 1, len(sizes)))
        steps = tuple(
            Step(float(confidence), int(size), bool(rng.uniform() < confidence))
            for confidence, size in zip(confidences, sizes, strict=True)
        )
        best = prediction(1, "a", (), 0.5, steps[0].confidence) if steps else None
        rank = 1 if steps and steps[0].right else None
        answered.append(AnsweredQuery(data_split="test", seen=None, rank=rank, best=best, levels=steps))
    unknown = AnsweredQuery(data_split="test", seen=None, rank=None)  # its types are not known
    figures = summarise_levels([*answered, unknown])
    assert figures["queries"] == 400
    steps_N = [each.levels or () for each in answered]

    def at(threshold: float) -> tuple[int, int, list[int]]:
        chosen = [next((each for each in steps if each.confidence >= threshold), None) for steps in steps_N]
        sizes = [each.size for each in chosen if each]
        return len(sizes), sum(bool(each and each.right) for each in chosen), sizes

    for row in figures["curve"]:
        count, right, sizes = at(row["threshold"])
        assert row["answered"] == pytest.approx(100 * count / 400, abs=0.01)
        assert row["right"] == pytest.approx(100 * right / count, abs=0.01)
        assert row["entities_left"] == np.median(sizes)
        first = [steps[0] for steps in steps_N if steps and steps[0].confidence >= row["threshold"]]
        assert row["entity"] == pytest.approx(100 * len(first) / 400, abs=0.01)
        if first:
            assert row["entity_right"] == pytest.approx(100 * np.mean([each.right for each in first]), abs=0.01)
        else:
            assert row["entity_right"] is None
    thresholds = sorted({each.confidence for steps in steps_N for each in steps})
    best = max(count for count, right, _ in map(at, thresholds) if right >= 0.9 * count)
    entity = max(
        len(first)
        for threshold in thresholds
        if (first := [steps[0] for steps in steps_N if steps and steps[0].confidence >= threshold])
        and np.mean([each.right for each in first]) >= 0.9
    )
    certain = max(
        len(last)
        for threshold in thresholds
        if (last := [steps[-1] for steps in steps_N if steps and steps[-1].confidence >= threshold])
        and np.mean([each.right for each in last]) >= 0.9
    )
    assert figures["at_90_right"]["most_specific"] == pytest.approx(best / 4, abs=1.0)  # of 500 thresholds
    assert figures["at_90_right"]["any"] == certain / 4
    assert figures["at_90_right"]["entity"] == entity / 4
    assert figures["at_90_right"]["ratio"] == pytest.approx(figures["at_90_right"]["any"] / entity * 4, abs=0.001)
    assert figures["threshold"] == 0.9


def test_without_levels_there_are_no_figures() -> None:
    nothing = AnsweredQuery(data_split="test", seen=None, rank=None)
    unread = AnsweredQuery(data_split="test", seen=None, rank=None, levels=())
    assert summarise_levels([nothing]) == summarise_levels([unread]) == summarise_levels([]) == {}
    wrong = AnsweredQuery(data_split="test", seen=None, rank=None, levels=(Step(0.4, 1, False),))
    figures = summarise_levels([wrong, unread])
    assert (figures["answered"], figures["right"], figures["entities_left"]) == (0.0, None, None)
    assert figures["at_90_right"] == {"any": 0.0, "most_specific": 0.0, "entity": 0.0, "ratio": None}
    assert "at 90 % right: 0.0 % answered at some level, 0.0 % with an entity" in as_table(
        summarise([wrong, unread], rejected=0)
    )


def test_the_command_reports_levels(bundle: Path, small_images: dict[str, bytes], tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for number, (entity_id, image) in enumerate([*small_images.items(), ("Q89", draw_png(seed=5)), ("new", b"x")]):
        (tmp_path / f"{number}.png").write_bytes(image)
        rows.append(
            {"data_id": str(number), "image": f"{number}.png", "entity_id": entity_id, "data_split": "test_seen"}
        )
    queries, report = tmp_path / "queries.jsonl", tmp_path / "report.html"
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--bundle", bundle, "--queries", queries, "--out", tmp_path / "out.jsonl", "--leave-out", "0.3"]
    done = CliRunner().invoke(evaluate, [*map(str, arguments), "--json", "--report", str(report)])
    assert done.exit_code == 0, done.output
    levels = json.loads(done.stdout)["levels"]
    assert levels["queries"] == len(small_images) + 1  # held out or not, but not the unknown one
    assert [row["threshold"] for row in levels["curve"]] == list(THRESHOLDS)
    assert 0 < levels["answered"] <= 100
    assert "Answers at some level" in report.read_text()
    assert Bundle.open(bundle).calibration is not None
