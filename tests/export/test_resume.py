"""A killed and resumed export has the bytes of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import UserError
from export.config import ExportConfig
from export.pipeline import export_bundle
from export.staging import StagingDir
from index.bundle import Bundle

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> ExportConfig:
    config = ExportConfig(
        catalog=catalog.path,
        checkpoint=checkpoint,
        out=tmp_path_factory.mktemp("uninterrupted") / "things",
        shard_size=2,
        batch_size=3,
        thumbnail_px=16,
        device="cpu",
    )
    export_bundle(config)
    return config


def assert_same_bundle(out: Path, other: Path) -> None:
    """Assert equal bytes except times, and no other files."""
    first, second = (
        {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for folder in (out, other)
    )
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith("manifest.json"):
            contents = [json.loads(path.read_text()) for path in (first[name], second[name])]
            for content in contents:
                del content["created_at"], content["elapsed_s"]
            assert contents[0] == contents[1]
        else:
            assert first[name].read_bytes() == second[name].read_bytes(), name
    Bundle.open(out, verify="full")
    rejected = [(folder.parent / "rejected.jsonl").read_bytes() for folder in (out, other)]
    assert rejected[0] == rejected[1]


def kill_once(config: ExportConfig, moment: Callable[[], bool]) -> None:
    """Run the export with --resume as a process, and kill it as soon as `moment` returns true."""
    arguments = {
        "--catalog": config.catalog,
        "--checkpoint": config.checkpoint,
        "--out": config.out,
        "--shard-size": config.shard_size,
        "--batch-size": config.batch_size,
        "--thumbnails": config.thumbnail_px,
        "--device": config.device,
    }
    command = [sys.executable, "-m", "wikiclip", "export", "--resume"]
    for option, value in arguments.items():
        command += [option, str(value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 300
        while not moment():
            assert process.poll() is None, f"ended before it could be killed: {process.communicate()[0]}"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_early_and_late(uninterrupted: ExportConfig, interrupted: ExportConfig) -> None:
    config = interrupted  # killed once
    work = config.out / ".partial"
    kill_once(config, (work / "shards" / "00006.json").exists)
    finished = len(list((work / "shards").iterdir()))
    assert not (config.out / "manifest.json").exists()
    with pytest.raises(UserError, match="unfinished export; finish it with --resume"):
        export_bundle(dataclasses.replace(config, resume=False))
    summary = export_bundle(config)
    assert 7 <= summary.resumed_shards <= finished < 12
    assert_same_bundle(config.out, uninterrupted.out)


def test_resume_of_a_missing_and_of_a_complete_bundle(uninterrupted: ExportConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(uninterrupted, out=tmp_path / "things", resume=True)
    assert not export_bundle(config).already_complete
    assert_same_bundle(config.out, uninterrupted.out)
    assert export_bundle(config).already_complete
    assert_same_bundle(config.out, uninterrupted.out)


@pytest.fixture(scope="module")
def killed_once(uninterrupted: ExportConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an export that was killed after some shards."""
    config = dataclasses.replace(uninterrupted, out=tmp_path_factory.mktemp("killed") / "things")
    kill_once(config, (config.out / ".partial" / "shards" / "00003.json").exists)
    return config.out


@pytest.fixture
def interrupted(uninterrupted: ExportConfig, killed_once: Path, tmp_path: Path) -> ExportConfig:
    shutil.copytree(killed_once, tmp_path / "things")
    return dataclasses.replace(uninterrupted, out=tmp_path / "things", resume=True)


def test_a_resume_with_other_inputs_changes_nothing(
    interrupted: ExportConfig, uninterrupted: ExportConfig, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in interrupted.out.rglob("*")}
    other_catalog = tmp_path / "other.jsonl"
    other_catalog.write_bytes(interrupted.catalog.read_bytes() + b"\n")
    other_checkpoint = tmp_path / "other"
    shutil.copytree(interrupted.checkpoint, other_checkpoint)
    with (other_checkpoint / "checkpoint.json").open("a") as file:
        file.write("\n")
    for change, name in (
        ({"catalog": other_catalog}, "catalog"),
        ({"checkpoint": other_checkpoint}, "checkpoint"),
        ({"shard_size": 3}, "shard size"),
        ({"image_root": tmp_path}, "image root"),
    ):
        with pytest.raises(UserError, match=f"was made with another {name}; resume with the same"):
            export_bundle(dataclasses.replace(interrupted, **change))
    assert {path: path.stat().st_mtime_ns for path in interrupted.out.rglob("*")} == before
    export_bundle(interrupted)
    assert_same_bundle(interrupted.out, uninterrupted.out)


def test_a_second_process_is_refused(interrupted: ExportConfig) -> None:
    descriptor = os.open(interrupted.out / ".partial", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another export is writing"):
            export_bundle(interrupted)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 4, 5])
def test_killed_while_the_bundle_is_moved_into_place(uninterrupted: ExportConfig, tmp_path: Path, moved: int) -> None:
    out = tmp_path / "things"
    shutil.copytree(uninterrupted.out, out)
    shutil.copy(uninterrupted.out.parent / "rejected.jsonl", tmp_path)
    staging = StagingDir(out)
    staging.bundle.mkdir(parents=True)
    settings = json.loads((out / "manifest.json").read_text())["export"]
    (out / ".partial" / "settings.json").write_text(json.dumps({**settings, "image_root": None}))
    parts = ["embeddings", "image_encoder.onnx", "entities.sqlite", "index", "manifest.json"]
    for name in parts[moved:]:
        os.replace(out / name, staging.bundle / name)
    (staging.bundle.parent / ".left.partial").write_text("half-written")
    export_bundle(dataclasses.replace(uninterrupted, out=out, resume=True))
    assert_same_bundle(out, uninterrupted.out)
