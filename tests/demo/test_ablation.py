"""The ablation on a few drawings, interrupted and resumed, and the committed table."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import demo
from core.errors import UserError
from demo.ablation import ARMS, STRATA, Symbols, main, summarise

DEMO = Path(demo.__file__).parent
SOME = ["image alone, untrained", "text only", "VGKA, both negatives", "VGKA, unfamiliar artists"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Twelve entities by two training artists, by a third that the encoder never saw, and by a held-out one.

    The last four are unseen. Two of those and two of the others are for validation.
    """
    build = tmp_path / "build"
    (build / "photos").mkdir(parents=True)
    random = np.random.default_rng(0)
    roles = {"a": "train", "b": "train", "c": "adapt", "d": "query"}
    drawings, catalog, pairs = [], [], []
    queries: dict[str, list[dict[str, Any]]] = {"val": [], "test": []}
    for entity in range(12):
        entity_id = f"emoji:{entity}"
        part, seen = "val" if entity % 4 < 2 and entity > 3 else "test", entity < 8
        ground = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        for artist, role in roles.items():
            image, photo = f"{artist}_{entity}.png", f"photos/{artist}_{artist}_{entity}.jpg"
            noise = random.integers(0, 40, (4, 4, 3), dtype=np.uint8)
            drawn = Image.fromarray(ground // 2 + noise).resize((64, 64), Image.Resampling.NEAREST)
            drawn.save(build / image)
            drawn.save(build / photo)
            split = f"{part}_{'seen' if seen else 'unseen'}"
            drawing = {"entity_id": entity_id, "kind": "emoji", "artist": artist, "icon": "", "image": image}
            drawings.append({**drawing, "split": split, "role": role})
            row = {"data_id": f"clean:{artist}:{entity_id}", "image": image, "entity_id": entity_id}
            if role == "query":
                queries[part].append({**row, "data_split": split})
            elif seen:
                pairs.append({**row, "data_split": "train_seen"})
        images = [f"{artist}_{entity}.png" for artist in "ab"]
        catalog.append(
            {"entity_id": entity_id, "title": f"Thing {entity}", "text": "a thing " * (entity + 1), "images": images}
        )
    write(build / "drawings.jsonl", drawings)
    write(build / "catalog.jsonl", catalog)
    write(build / "pairs_train.jsonl", pairs)
    for part, rows in queries.items():
        for how in ("clean", "photo"):
            write(build / f"queries_{part}_{how}.jsonl", rows)
    return build


def ablate(build: Path, out: Path, arms: list[str]) -> dict[str, Any]:
    small = ["--seeds", 2, "--epochs", 1, "--batch-size", 8, "--width", 16, "--max-per-entity", 3]
    chosen = [word for arm in arms for word in ("--arm", arm)]
    arguments = ["--build", build, "--work", out.parent / "work", "--out", out, *small, *chosen]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def test_finished_runs_are_not_repeated(build: Path, tmp_path: Path) -> None:
    first = ablate(build, tmp_path / "first.json", SOME[:2])
    runs = tmp_path / "work" / "runs.jsonl"
    lines = runs.read_text().splitlines()
    assert len(lines) == 3  # an untrained arm has one run
    every = ablate(build, tmp_path / "every.json", SOME)
    assert runs.read_text().splitlines()[:3] == lines
    assert len(runs.read_text().splitlines()) == 3 + 2 + 2
    assert {name: every["arms"][name] for name in SOME[:2]} == first["arms"]
    assert [*every["summary"]["clean"]] == [*every["summary"]["photo"]] == SOME
    untrained, trained = (every["summary"]["clean"][name]["all"] for name in (SOME[0], SOME[1]))
    assert "±" not in untrained
    assert "±" in trained


def test_a_held_out_entity_is_in_no_pair_and_a_test_entity_not_in_training(build: Path, tmp_path: Path) -> None:
    symbols = Symbols(build, tmp_path / "work", "tiny", 3)
    strata = symbols.strata
    assert strata[8:] == ["unseen"] * 4
    assert 0 < strata[:8].count("known") < 8
    trained = {row for row, stratum in enumerate(strata) if stratum == "trained"}
    assert {pair.entity for pair in symbols.pairs} == trained
    assert len(symbols.pairs) == 2 * len(trained)  # not the drawing that the entity's photograph shows
    assert len(symbols.unfamiliar) == len(trained)
    data = symbols.training_data(ARMS[0], 16)
    validated = {pair.entity for pair in symbols.validation}
    assert len(data.entities) == len(trained | validated) < len(symbols.entities)
    for before, after in zip(symbols.validation, data.validation, strict=True):
        assert data.entities[after.entity].images == symbols.entities[before.entity].images
        assert after.seen is (strata[before.entity] == "trained")
    tested = [strata[row] for row in (0, 1, 2, 3, 6, 7, 10, 11)]
    assert symbols.query_counts() == {stratum: tested.count(stratum) for stratum in STRATA}


def test_missing_symbols_are_an_error(tmp_path: Path) -> None:
    arguments = ["--build", str(tmp_path), "--out", str(tmp_path / "o.json")]
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, UserError)
    assert "make symbols" in str(done.exception)


def test_all_arms_differ() -> None:
    trained = {json.dumps({**asdict(arm), "name": "", "default": True}) for arm in ARMS}
    assert len(trained) == len({arm.name for arm in ARMS}) == len(ARMS)


def test_the_committed_summary_is_that_of_the_runs() -> None:
    figures = json.loads((DEMO / "ablation.json").read_bytes())
    assert summarise(figures["arms"]) == figures["summary"]
