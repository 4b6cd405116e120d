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
from core.markdown import fill_in
from demo.ablation import ARMS, main, table

DEMO = Path(demo.__file__).parent
START, END = "<!-- ablation: written by `make ablation` -->", "<!-- /ablation -->"
SOME = ["mean patch token, untrained", "text only", "VGKA, both", "VGKA, unfamiliar artists"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Six entities by two training artists, by a third that the encoder never saw, and by a held-out one."""
    build = tmp_path / "build"
    build.mkdir()
    random = np.random.default_rng(0)
    roles = {"a": "train", "b": "train", "c": "adapt", "d": "query"}
    drawings, catalog, pairs, queries = [], [], [], []
    for entity in range(6):
        entity_id = f"emoji:{entity}"
        ground = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        for artist, role in roles.items():
            image = f"{artist}_{entity}.png"
            noise = random.integers(0, 40, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(ground // 2 + noise).resize((64, 64), Image.Resampling.NEAREST).save(build / image)
            split = "test_unseen" if entity > 3 else "test_seen"
            drawing = {"entity_id": entity_id, "kind": "emoji", "artist": artist, "icon": "", "image": image}
            drawings.append({**drawing, "split": split, "role": role})
            row = {"data_id": f"clean:{artist}:{entity_id}", "image": image, "entity_id": entity_id}
            if role == "query":
                queries.append({**row, "data_split": split})
            elif entity <= 3:
                pairs.append({**row, "data_split": "train_seen"})
        images = [f"{artist}_{entity}.png" for artist in "ab"]
        catalog.append(
            {"entity_id": entity_id, "title": f"Thing {entity}", "text": "a thing " * (entity + 1), "images": images}
        )
    write(build / "drawings.jsonl", drawings)
    write(build / "catalog.jsonl", catalog)
    write(build / "pairs_train.jsonl", pairs)
    for how in ("clean", "photo"):
        write(build / f"queries_test_{how}.jsonl", queries)
    return build


def ablate(build: Path, out: Path, arms: list[str]) -> dict[str, Any]:
    page = out.with_suffix(".md")
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    small = ["--seeds", 2, "--epochs", 1, "--batch-size", 8, "--width", 16, "--max-per-entity", 3]
    chosen = [word for arm in arms for word in ("--arm", arm)]
    arguments = ["--build", build, "--work", out.parent / "work", "--out", out, "--page", page, *small, *chosen]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    figures: dict[str, Any] = json.loads(out.read_text())
    assert page.read_text() == f"before\n{START}\n\n{table(figures)}\n\n{END}\nafter\n"
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
    assert (every["settings"]["pairs"], every["settings"]["unfamiliar_pairs"]) == (12, 4)
    rows = [line.split(" | ")[0] for line in table(every).splitlines()]
    assert rows[2:6] == [f"| {name}" for name in SOME]


def test_missing_symbols_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("")
    arguments = ["--build", str(tmp_path), "--out", str(tmp_path / "o.json"), "--page", str(tmp_path / "page.md")]
    done = CliRunner().invoke(main, arguments)
    assert isinstance(done.exception, UserError)
    assert "make symbols" in str(done.exception)


def test_a_page_without_markers_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"text\n{START}\n")
    with pytest.raises(UserError, match="no place for the table"):
        fill_in(page, "ablation", "table")


def test_all_arms_differ() -> None:
    trained = {json.dumps({**asdict(arm), "name": "", "paper": None}) for arm in ARMS}
    assert len(trained) == len({arm.name for arm in ARMS}) == len(ARMS)


def test_the_page_shows_the_figures_of_the_last_run() -> None:
    figures = json.loads((DEMO / "ablation.json").read_bytes())
    assert table(figures) in (DEMO.parent / "docs" / "ablation.md").read_text(encoding="utf-8")
