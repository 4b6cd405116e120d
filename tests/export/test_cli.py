"""The command `wikiclip export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from index.bundle import Bundle
from tests.commands import run_wikiclip

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


def test_export_prints_a_summary(catalog: CatalogFiles, torch_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("export", "--catalog", catalog.path, "--checkpoint", torch_checkpoint, "--out", tmp_path / "b")
    arguments = (*arguments, "--float16")
    done = run_wikiclip(*arguments)
    assert done.returncode == 0, done.stderr
    assert "23 entities" in done.stdout
    assert "float16: lowest cosine " in done.stdout
    assert f"4 record(s) rejected, {catalog.images_failed} image(s) not used" in done.stdout
    assert Bundle.open(tmp_path / "b", verify="full").name == "b"

    resumed = run_wikiclip(*arguments, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["already_complete"] is True


def test_a_missing_catalog_is_reported_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    done = run_wikiclip(
        "export", "--catalog", tmp_path / "none.jsonl", "--checkpoint", checkpoint, "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "none.jsonl does not exist" in done.stderr
    assert not (tmp_path / "out").exists()
