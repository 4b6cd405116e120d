"""Training the tiny encoder: a killed run that is resumed ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

from demo.build import Drawing
from demo.train_tiny import EntityBatches, Objective, Settings, learning_rate, train
from model.tiny import TinyConfig, read_tiny

SCRIPT = """
import sys, torch
from pathlib import Path
from demo.train_tiny import Settings, train
from model.tiny import TinyConfig
build, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
settings = Settings(steps=12, small_px=16, entities_per_batch=3, warmup_steps=2, snapshot_every=4)
config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
train(build, out, settings, config, torch.device("cpu"), build / "snapshot.pt")
"""


def _drawing(entity: int, artist: str, role: str = "train") -> Drawing:
    entity_id = f"emoji:{entity}"
    return Drawing(
        entity_id=entity_id, kind="emoji", artist=artist, icon=str(entity), image=f"{artist}_{entity}.png",
        split="test_seen", role=role,
    )  # fmt: skip


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Six entities drawn by two artists, and by a third whose drawings are the queries."""
    drawings = [_drawing(entity, artist) for entity in range(6) for artist in ("a", "b")]
    drawings += [_drawing(entity, "c", "query") for entity in range(6)]
    random = np.random.default_rng(0)
    for drawing in drawings:
        pixels = random.integers(0, 256, (32, 32, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / drawing.image)
    _write(tmp_path / "drawings.jsonl", [vars(drawing) for drawing in drawings])
    _write(tmp_path / "catalog.jsonl", [{"entity_id": f"emoji:{e}", "text": f"thing number {e}"} for e in range(6)])
    queries = [
        {
            "data_id": str(e),
            "image": f"c_{e}.png",
            "entity_id": f"emoji:{e}",
            "data_split": f"x_{'unseen' if e % 2 else 'seen'}",
        }
        for e in range(6)
    ]
    for how in ("clean", "photo"):
        _write(tmp_path / f"queries_val_{how}.jsonl", queries)
    return tmp_path


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _start(build: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(build), str(out)], stderr=subprocess.DEVNULL)


def test_a_killed_run_resumes_to_the_same_weights(build: Path, tmp_path: Path) -> None:
    undisturbed, resumed = tmp_path / "undisturbed.safetensors", tmp_path / "resumed.safetensors"
    assert _start(build, undisturbed).wait(timeout=300) == 0
    snapshot = build / "snapshot.pt"
    snapshot.unlink()
    run = _start(build, resumed)
    deadline = time.monotonic() + 300
    while not snapshot.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)  # between two looks for the first snapshot
    assert snapshot.exists()
    run.send_signal(signal.SIGKILL)
    assert run.wait(timeout=30) == -signal.SIGKILL
    assert not resumed.exists()
    assert _start(build, resumed).wait(timeout=300) == 0
    first, _, notes = read_tiny(undisturbed)
    second, _, _ = read_tiny(resumed)
    assert notes["training_drawings"] == 12
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_run_with_other_settings_is_not_taken_up(build: Path, tmp_path: Path) -> None:
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
    out, snapshot = tmp_path / "out.safetensors", build / "snapshot.pt"

    def run(steps: int) -> None:
        settings = Settings(steps=steps, small_px=16, entities_per_batch=3, snapshot_every=1)
        train(build, out, settings, config, torch.device("cpu"), snapshot)

    run(1)
    kept = snapshot.read_bytes()
    with pytest.raises(click.ClickException, match="other settings; start over with --fresh"):
        run(2)
    assert snapshot.read_bytes() == kept


def test_batches_pair_two_artists_and_visit_every_entity() -> None:
    drawings = [_drawing(entity, artist) for entity in range(6) for artist in ("a", "b")]
    entities = [f"emoji:{entity}" for entity in range(6)]
    batches = iter(EntityBatches(drawings, entities, 3, torch.Generator().manual_seed(0)))
    seen: list[int] = []
    for _ in range(2):
        indices, entity = next(batches)
        assert [drawings[i].entity_id for i in indices] == [entities[e] for e in entity]
        for first, second in zip(indices[:3], indices[3:], strict=True):
            assert drawings[first].artist != drawings[second].artist
        seen += entity[:3].tolist()
    assert sorted(seen) == list(range(6))


def test_the_objective_is_lowest_where_pairs_and_texts_agree() -> None:
    torch.manual_seed(0)
    objective = Objective(torch.eye(4), 4, Settings())
    entity = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    together = torch.eye(4)[entity]
    apart = torch.eye(4)[torch.tensor([0, 1, 2, 3, 1, 2, 3, 0])]
    assert objective(together, entity)["image"] < objective(apart, entity)["image"]


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(0, settings) == pytest.approx(0.1)
    assert learning_rate(10, settings) == pytest.approx(1.0)
    assert learning_rate(99, settings) < 0.01
