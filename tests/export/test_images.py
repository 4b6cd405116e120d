"""Images in tar shards give the same embeddings as in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catalog.images import TarShards
from core.errors import CatalogError, UserError
from export.config import ExportConfig
from export.pipeline import export_bundle
from index.bundle import Bundle

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


def embeddings(bundle: Path) -> list[np.ndarray[Any, Any]]:
    return [np.load(path) for path in sorted((bundle / "embeddings").iterdir())]


def test_tar_shards_and_folders_give_the_same_bundle(
    tmp_path: Path, make_catalog: Callable[[Path], CatalogFiles], checkpoint: Path
) -> None:
    catalog = make_catalog(tmp_path)
    by_url = tmp_path / "by_url.jsonl"
    images = tmp_path / "shards"
    lines = []
    with TarShards(images, shard_bytes=2000) as shards:
        for line in catalog.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                lines.append(line)
                continue
            urls = []
            for name in row.get("images", []):
                url = name if "://" in name else f"https://images.example.org/{name}"
                urls.append(url)
                if (tmp_path / name).is_file() and not shards.knows(url):
                    shards.add(url, (tmp_path / name).read_bytes(), "image/png", {})
            lines.append(json.dumps({**row, "images": urls}))
    by_url.write_text("\n".join(lines) + "\n")
    assert len(list(images.glob("*.tar"))) > 1
    config = {"checkpoint": checkpoint, "shard_size": 4, "device": "cpu"}
    folder = export_bundle(ExportConfig(catalog=catalog.path, out=tmp_path / "a" / "things", **config))
    tar = export_bundle(ExportConfig(catalog=by_url, images=images, out=tmp_path / "b" / "things", **config))
    assert tar.counts == folder.counts
    for first, second in zip(embeddings(Path(tar.bundle)), embeddings(Path(folder.bundle)), strict=True):
        np.testing.assert_array_equal(first, second)
    Bundle.open(Path(tar.bundle), verify="full")
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "b" / "rejected.jsonl").read_text().splitlines()]
    assert sum("was not fetched; run fetch-images" in reason for reason in reasons) == 3


def test_a_folder_without_shards_is_refused(tmp_path: Path, catalog: CatalogFiles, checkpoint: Path) -> None:
    config = ExportConfig(catalog=catalog.path, checkpoint=checkpoint, out=tmp_path / "out", images=tmp_path)
    with pytest.raises(CatalogError, match="has no images"):
        export_bundle(config)
    assert not (tmp_path / "out").exists()


def test_a_resume_with_other_images_is_refused(
    tmp_path: Path, catalog: CatalogFiles, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        with TarShards(tmp_path / name, shard_bytes=1):
            pass
    config = {"catalog": catalog.path, "checkpoint": checkpoint, "out": tmp_path / "out", "device": "cpu"}

    def cut_off(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("export.pipeline.export_image_encoder", cut_off)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(ExportConfig(**config, images=tmp_path / "first"))
    with pytest.raises(UserError, match="another images"):
        export_bundle(ExportConfig(**config, images=tmp_path / "second", resume=True))
