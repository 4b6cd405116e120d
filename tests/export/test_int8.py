"""The int8 encoder of a bundle: its cost is measured, and a resumed export has the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from core.errors import EncoderSpecError, UserError
from core.statistics import Reservoir
from export import onnx as onnx_step
from export import pipeline, precision
from export.config import ExportConfig
from export.pipeline import export_bundle
from imaging import load_pixels
from index.bundle import Bundle
from index.calibration import Calibration
from index.manifest import INT8_ENCODER_FILE
from service.encoder import open_encoder
from service.settings import Settings

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


def embed(bundle: Bundle, images: list[Path], precision: str) -> np.ndarray[Any, Any]:
    encoder = open_encoder(bundle, preprocessing := _preprocessing(bundle), Settings(threads=1, precision=precision))
    pixels = [load_pixels(path.read_bytes(), preprocessing, max_pixels=10_000) for path in images]
    return encoder.encode(np.stack(pixels))


def _preprocessing(bundle: Bundle) -> Any:
    from imaging import Preprocessing

    return Preprocessing.from_dict(bundle.manifest.preprocessing)


def test_its_cost_is_in_the_manifest(int8_config: ExportConfig, catalog: CatalogFiles) -> None:
    bundle = Bundle.open(int8_config.out, verify="full")
    entry = bundle.manifest.image_encoder.int8
    assert entry is not None
    assert entry.judged_on == "catalog images"
    assert entry.calibrated_on + entry.images == len(catalog.images)
    assert 0.95 < entry.min_cosine <= entry.mean_cosine < 1
    images = list(catalog.images.values())
    float_ND, int8_ND = (embed(bundle, images, precision) for precision in ("float", "auto"))
    cosines_N = (float_ND * int8_ND).sum(1) / np.linalg.norm(int8_ND, axis=1)
    assert entry.min_cosine - 0.02 < cosines_N.mean() < 0.99999
    model = onnx.load(int8_config.out / INT8_ENCODER_FILE)
    types = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    assert any(len(onnx.numpy_helper.to_array(tensor)) > 1 for tensor in weights)
    data = (int8_config.out / INT8_ENCODER_FILE).read_bytes()
    assert str(Path.cwd()).encode() not in data
    assert b"/tmp/" not in data


def test_a_resume_may_add_or_drop_it(
    int8_config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = dataclasses.replace(int8_config, out=tmp_path / "things", resume=True)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("index.manifest.Manifest.write", fail)
        with pytest.raises(RuntimeError, match="killed"):
            export_bundle(again)
    assert (again.out / ".partial" / "bundle" / INT8_ENCODER_FILE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.StagingDir, "publish", fail)
        with pytest.raises(RuntimeError, match="killed"):
            export_bundle(dataclasses.replace(again, int8=False))
    assert not (again.out / ".partial" / "bundle" / INT8_ENCODER_FILE).exists()
    (again.out / ".partial" / "bundle" / "manifest.json").unlink()
    assert export_bundle(again).int8 is not None
    assert (again.out / INT8_ENCODER_FILE).read_bytes() == (int8_config.out / INT8_ENCODER_FILE).read_bytes()
    assert Bundle.open(again.out, verify="full").fingerprint == Bundle.open(int8_config.out).fingerprint
    with pytest.raises(UserError, match="was made with another int8"):
        export_bundle(dataclasses.replace(again, int8=False))


def test_it_is_judged_on_validation_queries(
    int8_config: ExportConfig, catalog: CatalogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"data_id": entity_id, "image": str(path), "entity_id": entity_id, "data_split": "val_seen"}
        for entity_id, path in catalog.images.items()
    ]
    validation = tmp_path / "queries.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n")
    calibration = Calibration(
        slope=20.0, none_offset=10.0, none_slope=0.0, abstain_below=0.5, queries=1, correct=1, unknown=0
    )
    monkeypatch.setattr("export.pipeline.calibrate_on", lambda *_: calibration)
    summary = export_bundle(dataclasses.replace(int8_config, out=tmp_path / "b", validation=validation))
    assert summary.int8 is not None
    assert summary.int8.judged_on == "validation queries"
    assert summary.int8.images == len(rows)
    # The queries are the entities' own images, so most answers are right with both files.
    assert min(summary.int8.top_1_float, summary.int8.top_1_int8, summary.int8.same_top_1) > 20


def test_an_encoder_that_cannot_be_quantised_is_refused_and_shards_are_kept(
    int8_config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"entity_id": "Q1", "title": "One", "text": "One.", "images": []}\n')
    change = dataclasses.replace(int8_config, catalog=texts, out=tmp_path / "texts")
    with pytest.raises(UserError, match="--int8 needs catalog images"):
        export_bundle(change)
    assert export_bundle(dataclasses.replace(change, int8=False, resume=True)).resumed_shards == 1
    monkeypatch.setattr(precision, "MIN_MEAN_COSINE", 1.1)
    with pytest.raises(EncoderSpecError, match=r"loses too much in int8: mean cosine 0\.9"):
        export_bundle(dataclasses.replace(int8_config, out=tmp_path / "b"))


def test_large_weights_are_external_data(
    int8_config: ExportConfig,
    catalog: CatalogFiles,
    torch_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The limit is lowered to simulate a model of gigabytes."""
    monkeypatch.setattr(onnx_step, "EXTERNAL_FROM_BYTES", 1000)
    large = dataclasses.replace(int8_config, checkpoint=torch_checkpoint, out=tmp_path / "large")
    export_bundle(large)
    names = {path.name for path in large.out.iterdir()}
    assert {f"image_encoder{kind}.onnx{data}" for kind in ("", ".int8") for data in ("", ".data")} <= names
    bundle, small = Bundle.open(large.out, verify="full"), Bundle.open(int8_config.out)
    assert bundle.unlisted_files() == []
    images = list(catalog.images.values())
    for kind in ("float", "auto"):
        found, expected = (embed(each, images, kind) for each in (bundle, small))
        assert (found * expected).sum(1).min() > 0.99
    moved = tmp_path / "moved"
    large.out.rename(moved)
    embed(Bundle.open(moved), images, "auto")
    again = dataclasses.replace(large, out=tmp_path / "again")
    export_bundle(again)
    for name in names - {"manifest.json", "index", "embeddings"}:
        assert (again.out / name).read_bytes() == (moved / name).read_bytes(), name


def test_a_reservoir_is_uniform_and_deterministic() -> None:
    drawn = []
    for _ in range(2):
        reservoir: Reservoir[int] = Reservoir(200)
        for number in range(10_000):
            reservoir.add(number)
        drawn.append(reservoir.items)
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 200
    assert 4000 < float(np.mean(drawn[0])) < 6000
