"""`wikiclip index` and `wikiclip inspect`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from index.bundle import Bundle
from index.live import LiveSegment
from tests.commands import run_wikiclip


@pytest.fixture
def bundle_copy(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "copy"))


def test_index_can_be_rebuilt_with_another_factory(bundle_copy: Path) -> None:
    before = Bundle.open(bundle_copy).fingerprint
    done = run_wikiclip("index", "--bundle", bundle_copy, "--factory", "HNSW8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["factory"] == "HNSW8"
    bundle = Bundle.open(bundle_copy, verify="full")
    assert bundle.index_manifest.factory == "HNSW8"
    assert bundle.fingerprint != before


def test_index_repairs_a_missing_index(bundle_copy: Path) -> None:
    shutil.rmtree(bundle_copy / "index")
    done = run_wikiclip("index", "--bundle", bundle_copy)
    assert done.returncode == 0, done.stderr
    assert "14 embeddings of width 16 as SQfp16" in done.stdout
    assert sorted(file.name for file in (bundle_copy / "index").iterdir()) == ["entity.faiss", "manifest.json"]
    Bundle.open(bundle_copy, verify="full")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--factory", "Nonsense"), "cannot make factory 'Nonsense'"),
        (("--factory", "IVF1000,Flat"), "cannot be trained on 14 embeddings"),
        (("--device", "cuda"), "this faiss sees no GPU"),
    ],
)
def test_a_refused_index_leaves_the_old_one(bundle_copy: Path, arguments: tuple[str, ...], reason: str) -> None:
    before = Bundle.open(bundle_copy).fingerprint
    done = run_wikiclip("index", "--bundle", bundle_copy, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr
    assert ".cpp" not in done.stderr  # the source location in faiss
    assert Bundle.open(bundle_copy).fingerprint == before


def test_inspect_describes_a_bundle(small_bundle: Path) -> None:
    done = run_wikiclip("inspect", small_bundle)
    assert done.returncode == 0, done.stderr
    assert f"small@{Bundle.open(small_bundle).fingerprint}" in done.stdout
    assert "12, 1 without an image" in done.stdout


def test_inspect_names_what_an_encoder_lacks(tmp_path: Path) -> None:
    (tmp_path / "encoder.onnx").write_bytes(b"junk")
    done = run_wikiclip("inspect", tmp_path / "encoder.onnx")
    assert done.returncode == 2
    assert "encoder.json is missing" in done.stdout
    assert "encoder.onnx is not an ONNX file" in done.stdout


def test_inspect_as_json(small_bundle: Path) -> None:
    report = json.loads(run_wikiclip("inspect", small_bundle, "--verify", "--json").stdout)
    assert report["counts"]["entities"] == report["stored_entities"] == 12
    assert report["verified"] == "full"


def test_inspect_refuses_an_altered_bundle_in_one_line(bundle_copy: Path) -> None:
    path = bundle_copy / "image_encoder.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    done = run_wikiclip("inspect", bundle_copy)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "image_encoder.onnx is altered" in done.stderr


def test_live_changes_are_compacted_into_a_new_bundle(small_bundle: Path, tmp_path: Path) -> None:
    folder = ("--live-dir", tmp_path / "live", "--out", tmp_path / "new")
    refused = run_wikiclip("index", "--bundle", small_bundle, "--compact", *folder)
    assert refused.returncode == 2
    assert "has no changes" in refused.stderr
    bundle = Bundle.open(small_bundle)
    with bundle.store() as store:
        live = LiveSegment(tmp_path / "live", bundle, store)
        live.delete("Q140")
        live.close()
    done = run_wikiclip("index", "--bundle", small_bundle, "--compact", *folder)
    assert done.returncode == 0, done.stderr
    assert "11 entities" in done.stdout
    assert Bundle.open(tmp_path / "new", "full").manifest.counts.entities == 11
    for wrong in (("--compact",), ("--live-dir", tmp_path), ("--compact", *folder, "--factory", "HNSW8")):
        assert run_wikiclip("index", "--bundle", small_bundle, *wrong).returncode == 2
