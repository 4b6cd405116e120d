"""A full disk and a missing image root: one line, exit status 2, and finished shards are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from core.errors import CatalogError, UserError
from core.files import report_disk_full
from export.config import ExportConfig
from export.pipeline import export_bundle
from tests.commands import run_wikiclip

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    reported = partial(report_disk_full, Path("out"), again="go on with --resume")
    with (
        pytest.raises(UserError, match=r"the disk of out is full; free some space and go on with --resume"),
        reported(),
    ):
        Path("/dev/full").write_bytes(b"x")
    with closing(sqlite3.connect(tmp_path / "small.sqlite")) as connection:
        connection.executescript("PRAGMA max_page_count = 3; CREATE TABLE t (x);")
        with pytest.raises(UserError, match="the disk of out is full"), reported():
            connection.execute("INSERT INTO t VALUES (zeroblob(100000))")
    with pytest.raises(FileNotFoundError), reported():
        Path("nowhere").read_bytes()


def test_an_export_resumes_after_space_was_freed(catalog: CatalogFiles, checkpoint: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in catalog.path.read_text().splitlines() if line.startswith('{"entity_id": "Q')]
    for row in rows:
        row["images"] = []
        row.pop("image_credits", None)  # they must have the length of the images
    next(row for row in rows if row["entity_id"] == "Q8")["text"] = (
        "long " * 300_000
    )  # 1.5 MB, written because of --store-text
    path = tmp_path / "catalog.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = ["export", "--resume", "--store-text", "--shard-size", "4"]
    arguments += ["--catalog", str(path), "--checkpoint", str(checkpoint), "--out", str(out)]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        full = run_wikiclip(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.returncode == 2, full.stderr
    assert "out is full; free some space and go on with --resume" in full.stderr.splitlines()[-1]
    assert len(list((out / ".partial" / "shards").glob("0*.json"))) == 2
    done = run_wikiclip(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed_shards"] == 2


def test_a_missing_image_root(catalog: CatalogFiles, checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        catalog=catalog.path, checkpoint=checkpoint, out=tmp_path / "out", image_root=tmp_path / "gone", device="cpu"
    )
    with pytest.raises(CatalogError, match="gone does not exist"):
        export_bundle(config)
    assert not config.out.exists()
    os.mkdir(tmp_path / "gone")
    assert export_bundle(dataclasses.replace(config, limit=2)).counts.entities == 2
