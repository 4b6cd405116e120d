"""An export with `--base` equals a full export, and computes only what changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import BundleAltered, UserError
from export.config import ExportConfig
from export.onnx import Parity, export_image_encoder
from export.pipeline import export_bundle
from index.bundle import Bundle
from model.encoders import ImageEncoder
from tests.export.conftest import CatalogFiles, write_checkpoint


def test_only_what_changed_is_computed(make_catalog: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    catalog: CatalogFiles = make_catalog(tmp_path / "catalog")
    first = ExportConfig(
        catalog=catalog.path,
        checkpoint=checkpoint,
        out=tmp_path / "first" / "things",
        shard_size=5,
        batch_size=3,
        thumbnail_px=16,
        device="cpu",
    )
    first.out.parent.mkdir()
    export_bundle(first)
    rows = [json.loads(line) for line in catalog.path.read_text().splitlines() if line.startswith('{"entity_id": "Q')]
    by_id = {row["entity_id"]: row for row in rows}
    by_id["Q0"]["title"] = "Renamed"  # embeddings do not depend on titles
    by_id["Q6"]["text"] = "Something else."
    catalog.images["Q9"].write_bytes(catalog.images["Q10"].read_bytes())
    del by_id["Q4"]
    # Q1 has an image that does not decode. It is tried again, because the reason is not stored.
    recomputed = {"Q1", "Q6", "Q9"}
    catalog.path.write_text("".join(json.dumps(row) + "\n" for row in reversed(by_id.values())))

    full = dataclasses.replace(first, out=tmp_path / "full" / "things")
    from_base = dataclasses.replace(first, out=tmp_path / "from_base" / "things", base=first.out)
    for config in (full, from_base):
        config.out.parent.mkdir()
    export_bundle(full)
    summary = export_bundle(from_base)
    assert summary.copied_entities == len(by_id) - len(recomputed)

    one, other, old = (Bundle.open(config.out, verify="full") for config in (full, from_base, first))
    assert one.manifest.counts == other.manifest.counts
    for name in ("entities.sqlite", "image_encoder.onnx"):
        assert (full.out / name).read_bytes() == (from_base.out / name).read_bytes(), name
    for file in sorted((full.out / "embeddings").glob("*.*.npy")):  # rows and content hashes
        assert file.read_bytes() == (from_base.out / "embeddings" / file.name).read_bytes(), file.name
    rejects = [(config.out.parent / "rejected.jsonl").read_bytes() for config in (full, from_base)]
    assert rejects[0] == rejects[1]
    # Batches with other samples round differently, so new embeddings are close and copied ones identical.
    every = np.arange(len(one.embeddings()))
    np.testing.assert_allclose(
        other.embeddings().stored(every).astype(np.float32),
        one.embeddings().stored(every).astype(np.float32),
        atol=1e-3,
    )
    with other.store() as store, old.store() as old_store:
        for entity_id in by_id:
            found = other.embeddings().rows_N == store.get(entity_id).row
            before = old.embeddings().rows_N == old_store.get(entity_id).row
            vectors = other.embeddings().stored(np.flatnonzero(found))
            vectors_before = old.embeddings().stored(np.flatnonzero(before))
            if entity_id == "Q9":  # texts have no effect yet: a new adaptor returns the mean of the image
                assert not np.allclose(vectors, vectors_before, atol=1e-3)
            elif entity_id not in recomputed:
                np.testing.assert_array_equal(vectors, vectors_before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> ExportConfig:
    out = tmp_path_factory.mktemp("whole") / "things"
    config = ExportConfig(catalog=catalog.path, checkpoint=checkpoint, out=out, limit=6, device="cpu")
    export_bundle(config)
    return config


def test_nothing_is_copied_with_another_thumbnail_size(whole: ExportConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(whole, out=tmp_path / "out" / "things", base=whole.out, thumbnail_px=16)
    config.out.parent.mkdir()
    summary = export_bundle(config)
    assert (summary.base_fits, summary.copied_entities) == (False, 0)


def test_the_image_encoder_is_copied_unless_its_file_would_differ(
    whole: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[bool] = []

    def counted(*given: Any, half: bool, **options: Any) -> Parity:
        exported.append(half)
        return export_image_encoder(*given, half=half, **options)

    monkeypatch.setattr("export.pipeline.export_image_encoder", counted)
    same = dataclasses.replace(whole, out=tmp_path / "same", base=whole.out)
    export_bundle(same)
    assert exported == []
    one, other = (Bundle.open(config.out, verify="full").manifest.image_encoder for config in (whole, same))
    assert one == other
    export_bundle(dataclasses.replace(same, out=tmp_path / "other", half=not whole.half))
    assert exported == [not whole.half]


def test_an_untrained_base_has_the_image_encoder_of_a_checkpoint_without_centre(
    whole: ExportConfig, image_encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = dataclasses.replace(
        whole, checkpoint=None, image_encoder=image_encoder.spec, out=tmp_path / "untrained" / "things"
    )
    untrained.out.parent.mkdir()
    export_bundle(untrained)
    centred = dataclasses.replace(
        whole, checkpoint=write_checkpoint(tmp_path / "centred", image_encoder, centre=True),
        base=untrained.out, out=tmp_path / "centred" / "things",
    )  # fmt: skip
    export_bundle(centred)
    without = dataclasses.replace(whole, base=untrained.out, out=tmp_path / "without" / "things")
    without.out.parent.mkdir()
    monkeypatch.setattr("export.pipeline.export_image_encoder", None)
    assert export_bundle(without).copied_entities == 0
    plain, other, copied = (
        (config.out / "image_encoder.onnx").read_bytes() for config in (untrained, centred, without)
    )
    assert plain == copied != other


def test_an_altered_image_encoder_is_not_copied(whole: ExportConfig, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "altered")
    file = tmp_path / "altered" / "image_encoder.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleAltered, match="is altered"):
        export_bundle(dataclasses.replace(whole, out=tmp_path / "out", base=tmp_path / "altered"))


def test_an_unusable_base_is_refused(whole: ExportConfig, small_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no content hashes"):
        export_bundle(dataclasses.replace(whole, out=tmp_path / "a", base=small_bundle))
    with pytest.raises(UserError, match="are both"):
        export_bundle(dataclasses.replace(whole, base=whole.out))
    with pytest.raises(UserError, match="does not exist"):
        export_bundle(dataclasses.replace(whole, out=tmp_path / "b", base=tmp_path / "nowhere"))
