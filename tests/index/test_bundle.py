"""A bundle opens only if it is complete and unaltered. Errors name the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from core.errors import BundleAltered, BundleError, BundleIncomplete, BundleMissing, BundleSchemaMismatch
from imaging import Preprocessing, load_pixels, normalise
from index.build import build_index
from index.bundle import Bundle


@pytest.fixture
def bundle_copy(small_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bundle, tmp_path / "copy"))


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object], name: str = "manifest.json") -> None:
    path = bundle / name
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("verify", ["quick", "full"])
def test_a_complete_bundle_opens(small_bundle: Path, verify: str) -> None:
    bundle = Bundle.open(small_bundle, verify="full" if verify == "full" else "quick")
    assert bundle.name == "small"
    assert bundle.manifest.counts.entities == 12
    assert len(bundle.embeddings()) == bundle.manifest.counts.embeddings == 14
    assert bundle.calibration is not None
    assert bundle.calibration.abstains(0.4)
    assert not bundle.calibration.abstains(0.6)
    assert bundle.unlisted_files() == []


def test_a_query_with_an_entitys_image_finds_it(small_bundle: Path, small_images: dict[str, bytes]) -> None:
    bundle = Bundle.open(small_bundle)
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    session = onnxruntime.InferenceSession(bundle.image_encoder_path, providers=["CPUExecutionProvider"])
    pixels_BHW3 = np.stack([load_pixels(data, preprocessing, max_pixels=10_000) for data in small_images.values()])
    (queries_BD,) = session.run(["image_embedding"], {"pixel_values": normalise(pixels_BHW3, preprocessing)})
    rows_BK, scores_BK = bundle.index().search(queries_BD, 3)
    with bundle.store() as store:
        best = [entity.entity_id for entity in store.by_rows(rows_BK[:, 0].tolist())]
    assert best == list(small_images)
    assert np.all(scores_BK[:, 0] > 0.999)
    assert np.all(scores_BK[:, 1] < 0.95)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleMissing, match="nowhere does not exist"):
        Bundle.open(tmp_path / "nowhere")


def test_a_file_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleMissing, match="does not exist as a folder"):
        Bundle.open(tmp_path / "file")


def test_a_folder_without_manifest_is_incomplete(bundle_copy: Path) -> None:
    (bundle_copy / "manifest.json").unlink()
    with pytest.raises(BundleIncomplete, match=r"--resume"):
        Bundle.open(bundle_copy)


def test_an_unknown_schema_version_is_refused(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda content: content.update(schema_version=99))
    with pytest.raises(BundleSchemaMismatch, match=r"schema version 99.* reads 1 and 2; upgrade it"):
        Bundle.open(bundle_copy)


def test_schema_2_is_read(bundle_copy: Path, small_bundle: Path) -> None:
    assert Bundle.open(small_bundle).manifest.schema_version == 1
    edit_manifest(bundle_copy, lambda content: content.update(schema_version=2))
    bundle = Bundle.open(bundle_copy)
    assert bundle.manifest.schema_version == 2
    assert bundle.manifest.model_dump(mode="json") == json.loads((bundle_copy / "manifest.json").read_text())


def test_entries_of_a_newer_version_are_ignored_but_fingerprinted(bundle_copy: Path, small_bundle: Path) -> None:
    def add(content: Any) -> None:
        content["later"] = {"a": [1]}
        content["counts"]["remembered"] = 3
        content["image_encoder"]["int4"] = {"file": "image_encoder.int4.onnx"}
        content["files"]["entities.sqlite"]["blake3"] = "0"

    edit_manifest(bundle_copy, add)
    edit_manifest(bundle_copy, lambda content: content.update(later=True), "index/manifest.json")
    bundle = Bundle.open(bundle_copy)
    assert bundle.fingerprint != Bundle.open(small_bundle).fingerprint
    assert bundle.manifest.counts.entities == Bundle.open(small_bundle).manifest.counts.entities
    for manifest, name in ((bundle.manifest, "manifest.json"), (bundle.index_manifest, "index/manifest.json")):
        written = (bundle_copy / name).read_text()
        manifest.write(bundle_copy / name)
        assert json.loads((bundle_copy / name).read_text()) == json.loads(written)


def test_entries_that_equal_their_default_are_left_out(bundle_copy: Path, small_bundle: Path) -> None:
    """As in a manifest of version 0.1, whose fingerprint must not change."""
    written = (bundle_copy / "manifest.json").read_bytes()
    assert "int8" not in json.loads(written)["image_encoder"]
    before = Bundle.open(bundle_copy)
    edit_manifest(bundle_copy, lambda content: content["image_encoder"].update(int8=None, float16=None))
    bundle = Bundle.open(bundle_copy)
    assert (bundle.manifest, bundle.fingerprint) == (before.manifest, before.fingerprint)
    bundle.manifest.write(bundle_copy / "manifest.json")
    assert (bundle_copy / "manifest.json").read_bytes() == written


@pytest.mark.parametrize(
    "name",
    [
        "image_encoder.onnx",
        "entities.sqlite",
        "embeddings/00001.npy",
        "embeddings/00000.rows.npy",
        "index/entity.faiss",
    ],
)
class TestEachFile:
    def test_missing(self, bundle_copy: Path, name: str) -> None:
        (bundle_copy / name).unlink()
        with pytest.raises(BundleIncomplete, match=f"{name} is missing"):
            Bundle.open(bundle_copy)

    def test_cut_short(self, bundle_copy: Path, name: str) -> None:
        data = (bundle_copy / name).read_bytes()
        (bundle_copy / name).write_bytes(data[:-1])
        with pytest.raises(BundleAltered, match=f"{name} has {len(data) - 1} bytes, the manifest says {len(data)}"):
            Bundle.open(bundle_copy)

    def test_altered(self, bundle_copy: Path, name: str) -> None:
        flip_last_byte(bundle_copy / name)
        with pytest.raises(BundleAltered, match=f"{name} is altered"):
            Bundle.open(bundle_copy)


def test_a_large_file_is_hashed_only_by_a_full_check(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.bundle._SMALL_BYTES", 100)
    flip_last_byte(bundle_copy / "entities.sqlite")
    Bundle.open(bundle_copy)
    with pytest.raises(BundleAltered, match=r"entities\.sqlite is altered"):
        Bundle.open(bundle_copy, verify="full")


def test_a_quick_check_does_not_hash_many_embeddings(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.bundle._HASHED_BYTES", 1000)
    flip_last_byte(bundle_copy / "embeddings/00001.npy")
    Bundle.open(bundle_copy)
    with pytest.raises(BundleAltered, match=r"embeddings/00001\.npy is altered"):
        Bundle.open(bundle_copy, verify="full")
    flip_last_byte(bundle_copy / "image_encoder.onnx")
    with pytest.raises(BundleAltered, match=r"image_encoder\.onnx is altered"):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda content: content.pop("counts"), "counts Field required"),
        (lambda content: content.update(counts={"entities": 1}), r"counts\.embeddings Field required"),
        (lambda content: content.update(files={"../outside": {"bytes": 1, "sha256": "0"}}), "outside the bundle"),
        (lambda content: content["files"].pop("entities.sqlite"), r"does not list entities\.sqlite"),
        (lambda content: content.update(files=[]), "manifest.json"),
    ],
)
def test_an_edited_manifest_is_refused(
    bundle_copy: Path, edit: Callable[[dict[str, Any]], object], reason: str
) -> None:
    edit_manifest(bundle_copy, edit)
    with pytest.raises(BundleAltered, match=reason):
        Bundle.open(bundle_copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
@pytest.mark.parametrize("name", ["manifest.json", "index/manifest.json"])
def test_a_manifest_that_is_not_an_object_is_refused(bundle_copy: Path, name: str, text: str) -> None:
    (bundle_copy / name).write_text(text)
    with pytest.raises(BundleAltered, match=name):
        Bundle.open(bundle_copy)


def test_a_missing_index_manifest_names_the_remedy(bundle_copy: Path) -> None:
    (bundle_copy / "index/manifest.json").unlink()
    with pytest.raises(BundleIncomplete, match="wikiclip index"):
        Bundle.open(bundle_copy)


def test_the_index_of_another_bundle_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    from index.embeddings import EmbeddingShards, write_shard

    other = tmp_path / "other"
    (other / "embeddings").mkdir(parents=True)
    write_shard(other / "embeddings", 0, np.arange(3), np.eye(3, 16, dtype=np.float32))
    build_index(bundle_copy, EmbeddingShards(other / "embeddings", 16))
    with pytest.raises(BundleAltered, match="the index holds 3 embeddings"):
        Bundle.open(bundle_copy).index()


def test_every_error_is_one_line(bundle_copy: Path) -> None:
    flip_last_byte(bundle_copy / "index/entity.faiss")
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle_copy)
    assert "\n" not in caught.value.detail


def test_fingerprint_ignores_times_only(bundle_copy: Path, small_bundle: Path) -> None:
    before = Bundle.open(small_bundle).fingerprint
    assert len(before) == 12
    for name in ("manifest.json", "index/manifest.json"):
        edit_manifest(bundle_copy, lambda content: content.update(created_at="2030-01-01", elapsed_s=9.0), name)
    assert Bundle.open(bundle_copy).fingerprint == before
    edit_manifest(bundle_copy, lambda content: content.update(calibration=None))
    assert Bundle.open(bundle_copy).fingerprint != before


def test_unlisted_files_are_reported(bundle_copy: Path) -> None:
    (bundle_copy / "NOTES").write_text("x")
    assert Bundle.open(bundle_copy).unlisted_files() == ["NOTES"]
