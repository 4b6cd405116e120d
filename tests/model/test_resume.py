"""A resumed run ends with the same result as an uninterrupted one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.errors import CheckpointError
from model.resume import Snapshots
from model.run import TrainRequest, run_training
from model.trainer import TrainSettings


def request(dataset: Any, tiny_spec: str, text_spec: str, out: Path, cache: Path, **changes: Any) -> TrainRequest:
    """Eight pairs in batches of three, two batches per step: 6 steps in all, with every random option on."""
    settings = {
        "epochs": 3,
        "batch_size": 3,
        "accumulate": 2,
        "lr": 3e-3,
        "modality_dropout": 0.2,
        "text_mask": 0.2,
        **changes.pop("settings", {}),
    }
    values: dict[str, Any] = {
        "catalog": dataset.catalog,
        "pairs": dataset.pairs,
        "validation": dataset.validation,
        "out": out,
        "image_encoder": tiny_spec,
        "text_encoder": text_spec,
        "settings": TrainSettings(**settings),
        "adaptor": {"width": 16, "heads": 2, "dropout": 0.2},
        "cache_dir": cache,
        "max_tokens": 16,
        "device": "cpu",
        "snapshot_every": 1,
        **changes,
    }
    return TrainRequest(**values)


def result_of(out: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Return the checkpoint's files, and the log without speeds."""
    rows = [json.loads(line) for line in out.with_name(f"{out.name}.train.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("pairs_per_s", None)
    return [(out / name).read_bytes() for name in ("adaptor.safetensors", "checkpoint.json")], rows


class CutOff(Exception):
    pass


@pytest.mark.parametrize("hard_negatives", ["none", "both"])
def test_resuming_from_every_step(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_negatives: str
) -> None:
    def asked(out: Path, **changes: Any) -> TrainRequest:
        hard = {"hard_negatives": hard_negatives, "n_sync": 2}
        return request(dataset, tiny_spec, text_spec, out, tmp_path / "cache", settings=hard, **changes)

    undisturbed = tmp_path / "undisturbed"
    run_training(asked(undisturbed))
    assert not list(tmp_path.glob("*.snapshot.pt"))
    save = Snapshots.save
    for step in range(1, 7):
        out = tmp_path / f"cut-{step}"

        def save_and_stop(self: Snapshots, values: Any, last: int = step) -> None:
            save(self, values)
            if values["trainer"]["steps_done"] == last:
                raise CutOff

        with monkeypatch.context() as patch:
            patch.setattr(Snapshots, "save", save_and_stop)
            with pytest.raises(CutOff):
                run_training(asked(out))
        assert not out.exists()
        run_training(asked(out, resume=True))
        assert result_of(out) == result_of(undisturbed)
        assert not list(tmp_path.glob("*.snapshot.pt"))


def test_resuming_after_a_kill(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    def flags(out: Path) -> list[str]:
        values: dict[str, Any] = {
            "catalog": dataset.catalog,
            "pairs": dataset.pairs,
            "image-encoder": tiny_spec,
            "text-encoder": text_spec,
            "out": out,
            "cache-dir": tmp_path / "cache",
            "epochs": 20,
            "batch-size": 4,
            "width": 16,
            "heads": 2,
            "max-tokens": 16,
            "snapshot-every": 2,
            "hold-out": 0,
            "device": "cpu",
        }
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "wikiclip", "train", *flags(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    while not (steps := re.search(rb"training:.*?\| (\d+)/40", seen)) or int(steps[1]) < 10:
        part = process.stderr.read1(4096)
        assert part, seen.decode()
        seen = (seen + part)[-4096:] if not steps else part
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not out.exists()
    assert (tmp_path / "killed.snapshot.pt").exists()
    for path, more in ((out, ["--resume"]), (tmp_path / "undisturbed", [])):
        # In a process, as the killed run was: digits depend on the number of threads.
        subprocess.run(
            [sys.executable, "-m", "wikiclip", "train", *flags(path), *more], capture_output=True, check=True
        )
    assert result_of(out) == result_of(tmp_path / "undisturbed")


def test_resuming_without_a_snapshot_starts_over(dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_training(request(dataset, tiny_spec, text_spec, tmp_path / name, tmp_path / "cache", resume=name == "b"))
    assert result_of(tmp_path / "a") == result_of(tmp_path / "b")


def test_damaged_snapshots_and_those_of_other_runs_are_rejected(
    dataset: Any, tiny_spec: str, text_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "remove", lambda self: None)
        run_training(request(dataset, tiny_spec, text_spec, out, tmp_path / "cache"))
    before = (out / "checkpoint.json").read_bytes()
    other = request(dataset, tiny_spec, text_spec, out, tmp_path / "cache", resume=True, settings={"lr": 1e-3})
    with pytest.raises(CheckpointError, match="other settings"):
        run_training(other)
    snapshot = tmp_path / "out.snapshot.pt"
    snapshot.write_bytes(snapshot.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        run_training(request(dataset, tiny_spec, text_spec, out, tmp_path / "cache", resume=True))
    assert (out / "checkpoint.json").read_bytes() == before
