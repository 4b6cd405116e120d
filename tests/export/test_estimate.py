"""An estimate has the counts of an export and sizes close to it, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import CatalogError
from export.config import ExportConfig
from export.estimate import estimate_export, estimate_lines
from export.pipeline import export_bundle

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> ExportConfig:
    """A catalog of 300 entities, two of three with a text, and two bad records."""
    folder = tmp_path_factory.mktemp("many")
    rows = [
        {"entity_id": f"Q{n}", "title": f"Thing {n}", "text": "One text. " * (n % 3), "images": []} for n in range(300)
    ]
    lines = [*map(json.dumps, rows[:200]), "{no json", '{"title": "no id"}', *map(json.dumps, rows[200:])]
    (folder / "catalog.jsonl").write_text("\n".join(lines))
    return ExportConfig(
        catalog=folder / "catalog.jsonl", checkpoint=checkpoint, out=folder / "b", shard_size=100, device="cpu"
    )


def test_an_estimate_is_close_to_the_export(config: ExportConfig) -> None:
    estimate = estimate_export(config)
    assert not config.out.exists()
    assert [path.name for path in config.out.parent.iterdir()] == ["catalog.jsonl"]
    bundle = export_bundle(config)
    assert (
        (estimate.entities, estimate.rejected, estimate.shards)
        == (300, bundle.counts.rejected, bundle.shards)
        == (300, 2, 3)
    )
    assert estimate.embeddings == bundle.counts.embeddings
    assert estimate.with_image == 0
    assert 0 < estimate.measured_entities < 300  # the first shards are not counted
    sizes = {path.name: path.stat().st_size for path in config.out.rglob("*") if path.is_file()}
    assert estimate.disk_bytes["embeddings"] == sum(size for name, size in sizes.items() if name.endswith(".npy"))
    assert estimate.disk_bytes["index"] == pytest.approx(sizes["entity.faiss"], rel=0.01)
    assert estimate.disk_bytes["store"] == pytest.approx(sizes["entities.sqlite"], rel=0.5, abs=100_000)
    assert estimate.disk_bytes["image encoder"] == pytest.approx(sizes["image_encoder.onnx"], rel=0.5, abs=100_000)
    assert estimate.total_s == pytest.approx(sum(estimate.seconds.values()))
    assert estimate.seconds[estimate.bottleneck] == max(estimate.seconds.values()) > 0
    assert {"image encoder", "text encoder", "adaptor", "reading, decoding and tokenising"} <= estimate.seconds.keys()
    text = "\n".join(estimate_lines(estimate, config))
    assert "300 entities, 0 with an image, 2 record(s) rejected" in text
    assert f"bottleneck: {estimate.bottleneck}" in text


def test_few_entities_and_none(catalog: CatalogFiles, checkpoint: Path, tmp_path: Path) -> None:
    few = ExportConfig(catalog=catalog.path, checkpoint=checkpoint, out=tmp_path / "b", limit=3, device="cpu")
    estimate = estimate_export(few)
    assert (estimate.entities, estimate.with_image, estimate.measured_entities) == (3, 3, 3)
    assert estimate.embeddings == 4
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(CatalogError, match="no usable entity record"):
        estimate_export(ExportConfig(catalog=tmp_path / "bad.jsonl", checkpoint=checkpoint, out=tmp_path / "b"))
