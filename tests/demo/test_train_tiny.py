"""Training the tiny encoder: batches, objective, and exact resuming."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import CheckpointError
from demo.build import Drawing
from demo.icons import ROLE as ICON_ROLE
from demo.tiny_data import EntityBatches, mean_patch_tokens
from demo.train_tiny import Objective, Settings, keep_length, learning_rate, mix, train
from model.encoders.tiny import TinyConfig, TinyEncoder, read_tiny

CONFIG = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
SETTINGS = Settings(steps=12, small_px=16, entities_per_batch=3, warmup_steps=2, snapshot_every=4)
SCRIPT = f"""
import sys, torch
from pathlib import Path
from demo.train_tiny import Settings, train
from model.encoders.tiny import TinyConfig
build, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
train(build, out, {SETTINGS!r}, {CONFIG!r}, torch.device("cpu"), build / "snapshot.pt")
"""


def _drawing(entity: int, artist: str, role: str = "train") -> Drawing:
    entity_id = f"emoji:{entity}"
    return Drawing(
        entity_id=entity_id, kind="emoji", artist=artist, icon=str(entity), image=f"{artist}_{entity}.png",
        split="test_seen", role=role,
    )  # fmt: skip


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Six entities by two training artists, and by a held-out one for the queries."""
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of several threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_run_resumes_to_the_same_weights(build: Path, tmp_path: Path) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted.safetensors", tmp_path / "resumed.safetensors"
    train(build, uninterrupted, SETTINGS, CONFIG, torch.device("cpu"), build / "snapshot.pt")
    snapshot = build / "snapshot.pt"
    snapshot.unlink()
    command = [sys.executable, "-c", SCRIPT, str(build), str(resumed)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not snapshot.exists() and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)  # polls for the first snapshot
    assert snapshot.exists()
    run.send_signal(signal.SIGKILL)
    assert run.wait(timeout=30) == -signal.SIGKILL
    assert not resumed.exists()
    train(build, resumed, SETTINGS, CONFIG, torch.device("cpu"), snapshot)
    first, _, notes = read_tiny(uninterrupted)
    second, _, _ = read_tiny(resumed)
    assert notes["training_drawings"] == 12
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_run_with_other_settings_is_not_resumed(build: Path, tmp_path: Path) -> None:
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
    out, snapshot = tmp_path / "out.safetensors", build / "snapshot.pt"

    def run(steps: int) -> None:
        settings = Settings(steps=steps, small_px=16, entities_per_batch=3, snapshot_every=1)
        train(build, out, settings, config, torch.device("cpu"), snapshot)

    run(1)
    kept = snapshot.read_bytes()
    with pytest.raises(CheckpointError, match="other settings"):
        run(2)
    assert snapshot.read_bytes() == kept


def test_training_further_with_icons(build: Path, tmp_path: Path) -> None:
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
    first, further = tmp_path / "first.safetensors", tmp_path / "further.safetensors"
    settings = Settings(steps=2, small_px=16, entities_per_batch=3, things_per_batch=2, snapshot_every=2)
    train(build, first, settings, config, torch.device("cpu"), build / "first.pt")
    icons = [_drawing(entity, artist, ICON_ROLE) for entity in (0, 7, 8, 9) for artist in ("a", "b")]
    for icon in icons[:-1]:  # the last one is blank and has no file
        Image.fromarray(np.full((32, 32, 4), 99, np.uint8)).save(build / icon.image)

    def train_further(steps: int) -> None:
        more = replace(settings, steps=steps, hardest_from=0.0)
        train(build, further, more, first, torch.device("cpu"), build / "further.pt", icons)

    train_further(2)
    before, _, _ = read_tiny(first)
    after, _, notes = read_tiny(further)
    assert notes["icons"] == 8
    assert notes["begun_from_sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert any(not torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))
    further.unlink()
    train_further(2)  # resumes from the last step
    again, _, _ = read_tiny(further)
    assert all(torch.equal(old, new) for old, new in zip(after.parameters(), again.parameters(), strict=True))
    first.write_bytes(further.read_bytes())
    with pytest.raises(CheckpointError, match="other settings"):
        train_further(2)


def test_batches_pair_two_artists_and_visit_every_entity() -> None:
    drawings = [_drawing(entity, artist) for entity in range(6) for artist in ("a", "b")]
    entities = [f"emoji:{entity}" for entity in range(6)]
    batches = EntityBatches(drawings, [entities], [3], seed=0)
    seen: list[int] = []
    for number in range(2):
        indices, entity = batches.batch(number)
        assert [drawings[i].entity_id for i in indices] == [entities[e] for e in entity]
        for first, second in zip(indices[:3], indices[3:], strict=True):
            assert drawings[first].artist != drawings[second].artist
        seen += entity[:3].tolist()
    assert sorted(seen) == list(range(6))


def test_second_images_can_be_icons_and_things_join_the_batch() -> None:
    drawings = [_drawing(entity, artist) for entity in range(4) for artist in ("a", "b")]
    drawings += [_drawing(entity, artist, ICON_ROLE) for entity in (0, 7, 8) for artist in ("x", "y")]
    entities, things = [f"emoji:{entity}" for entity in range(4)], ["emoji:7", "emoji:8"]
    indices, label = EntityBatches(drawings, [entities, things], [4, 2], seed=0, icon_share=1.0).batch(0)
    assert [drawings[i].entity_id for i in indices] == [[*entities, *things][each] for each in label]
    assert label[:6].tolist() == label[6:].tolist()
    assert sorted(label[:4].tolist()) == [0, 1, 2, 3]
    for place, each in enumerate(label[:6].tolist()):
        first, second = drawings[indices[place]], drawings[indices[place + 6]]
        assert first.artist != second.artist
        assert (first.role == ICON_ROLE) == (each >= 4)
        assert (second.role == ICON_ROLE) == (each in (0, 4, 5))


def test_the_objective_is_lower_for_matching_pairs() -> None:
    torch.manual_seed(0)
    objective = Objective(torch.eye(4), 4, Settings())
    entity = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    together = torch.eye(4)[entity]
    apart = torch.eye(4)[torch.tensor([0, 1, 2, 3, 1, 2, 3, 0])]
    assert objective(together, entity, 4)["image"] < objective(apart, entity, 4)["image"]


def test_things_without_a_text_are_only_negatives_of_texts() -> None:
    torch.manual_seed(0)
    objective = Objective(torch.eye(4), 4, Settings(), things=2)
    label = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    embedding = torch.nn.functional.normalize(torch.randn(12, 4), dim=1)
    entities = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
    both, alone = objective(embedding, label, 4), objective(embedding[entities], label[entities], 4)
    others = embedding.clone()
    others[[4, 5, 10, 11]] *= -1
    assert objective(others, label, 4)["text"] != both["text"]  # things are negatives of the texts
    assert both["text"] > alone["text"]
    objective.warm(torch.eye(6, 4))
    assert torch.equal(objective.prototypes, torch.eye(6, 4))


def test_a_normalised_embedding_shows_its_length() -> None:
    torch.manual_seed(0)
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
    encoder = TinyEncoder(config).eval()
    with torch.no_grad():
        encoder.projection.weight[7] *= 0.01  # one direction is almost unused
    drawings = torch.randint(0, 256, (64, 4, 32, 32), dtype=torch.uint8)
    drawings[:, 3] = 255
    before_nD = mean_patch_tokens(encoder, drawings, torch.device("cpu"))
    length_n = before_nD.norm(dim=1)
    keep_length(encoder, before_nD, 0.2)
    after_nD = mean_patch_tokens(encoder, drawings, torch.device("cpu"))
    added_nD = after_nD - before_nD
    torch.testing.assert_close(added_nD, added_nD[:1].expand_as(added_nD), atol=0.05 * float(length_n.median()), rtol=0)
    direction_D = added_nD.mean(0) / added_nD.mean(0).norm()
    kept_n = torch.nn.functional.normalize(after_nD, dim=1) @ direction_D
    assert torch.corrcoef(torch.stack([kept_n, 1 / length_n]))[0, 1] > 0.9


def test_the_learning_rate_rises_and_falls() -> None:
    settings = Settings(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(0, settings) == pytest.approx(0.1)
    assert learning_rate(10, settings) == pytest.approx(1.0)
    assert learning_rate(99, settings) < 0.01


def test_mixing_weights() -> None:
    config = TinyConfig(widths=(8, 8, 16, 16), blocks=(1, 1), attention_layers=1, heads=2, embedding_dim=8, size_px=32)
    encoder, start = TinyEncoder(config), TinyEncoder(config)
    before = encoder.projection.weight.clone()
    mix(encoder, start, 0.25)
    torch.testing.assert_close(encoder.projection.weight.data, 0.75 * before + 0.25 * start.projection.weight)
