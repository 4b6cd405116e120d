"""An export equals a slow loop over the catalog, and reports rejects."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from catalog import EntityRecord, read_catalog
from core.errors import CatalogError, CheckpointError, UserError
from export.config import ExportConfig
from export.pipeline import ExportSummary, export_bundle
from imaging import load_pixels, normalise
from index.bundle import Bundle
from index.calibration import background
from index.manifest import OPEN_SET_FILE
from model.checkpoint import Checkpoint

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    config: ExportConfig
    summary: ExportSummary
    bundle: Bundle


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, checkpoint: Path) -> Done:
    config = ExportConfig(
        catalog=catalog.path,
        checkpoint=checkpoint,
        out=tmp_path_factory.mktemp("out") / "things",
        shard_size=5,
        batch_size=3,
        thumbnail_px=20,
        device="cpu",
    )
    summary = export_bundle(config)
    return Done(config=config, summary=summary, bundle=Bundle.open(config.out, verify="full"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_counts(done: Done, catalog: CatalogFiles) -> None:
    counts = done.bundle.manifest.counts
    assert counts.entities == catalog.entities
    assert counts.rejected == catalog.rejected
    assert counts.images_failed == catalog.images_failed
    assert counts.without_image == catalog.without_image
    assert counts.without_text == catalog.without_text
    assert counts.embeddings == len(done.bundle.embeddings()) > counts.entities
    assert done.summary.counts == counts
    assert done.summary.shards == 5


def test_the_bundle_has_only_listed_files(done: Done) -> None:
    assert sorted(entry.name for entry in done.config.out.iterdir()) == [
        "embeddings",
        "entities.sqlite",
        "image_encoder.onnx",
        "index",
        "manifest.json",
    ]
    assert done.bundle.unlisted_files() == []


def test_no_file_has_paths_of_this_machine(done: Done, catalog: CatalogFiles) -> None:
    for name, data in content(done.config.out).items():
        for place in (str(catalog.path.parent), str(done.config.checkpoint), str(Path.home()), str(Path.cwd())):
            assert len(place) < 3 or place.encode() not in data, f"{name} holds {place}"


def test_embeddings_equal_those_of_single_images(done: Done, catalog: CatalogFiles) -> None:
    """Compare with one image at a time, without batches and shards."""
    checkpoint = Checkpoint.load(done.config.checkpoint)
    expected: list[tuple[int, torch.Tensor]] = []
    records = [item for item in read_catalog(catalog.path) if isinstance(item, EntityRecord)]
    for row, record in enumerate(records):
        text = checkpoint.text_encoder.encode([record.text])
        usable = [Path(image) for image in record.images if Path(image).is_file() and "broken" not in image]
        for number in range(max(len(usable), 1)):
            if not usable:
                patches_BPC = torch.zeros(1, checkpoint.image_encoder.patches, checkpoint.image_encoder.patch_dim)
                image_BD = torch.zeros(1, checkpoint.image_encoder.embedding_dim)
            else:
                pixels = load_pixels(
                    usable[number].read_bytes(), checkpoint.image_encoder.preprocessing, max_pixels=10_000
                )
                features = checkpoint.image_encoder.encode(pixels[None])
                patches_BPC, image_BD = features.patch_tokens_BPC, features.image_embedding_BD
            has_image = torch.tensor([bool(usable)])
            embedding = checkpoint.adaptor(patches_BPC, has_image, text.text_tokens_BTC, text.mask_BT, image_BD)
            expected.append((row, embedding[0]))
    embeddings = done.bundle.embeddings()
    assert embeddings.rows_N.tolist() == [row for row, _ in expected]
    found_ND = np.concatenate(list(embeddings))
    cosines_N = (found_ND * torch.stack([embedding for _, embedding in expected]).numpy()).sum(1)
    assert cosines_N.min() > 0.99999


def test_the_store_has_the_records(done: Done) -> None:
    with done.bundle.store() as store:
        assert len(store) == 23
        several, one = store.by_rows([0, 1])
        assert (several.entity_id, several.title, several.image_count) == ("Q0", "Thing 0", 2)
        assert several.description == "Thing number 0 is a thing."
        assert several.types == ("thing",)
        assert several.text is None
        assert one.image_count == 1
        assert one.image_credits == ({"author": "Ann", "licence": "CC BY 4.0"},)  # those of unusable images are dropped
        assert several.image_credits == ()
        assert store.get("Q5").has_text is False
        assert store.get("Q5").description is None
        assert store.get("Q3").image_count == 0
        assert store.thumbnail("Q3") is None
        webp = store.thumbnail("Q1")
    assert webp is not None
    assert webp[8:12] == b"WEBP"
    assert Image.open(io.BytesIO(webp)).size == (20, 13)


def test_the_exported_encoder_equals_the_model(done: Done, catalog: CatalogFiles) -> None:
    encoder = Checkpoint.load(done.config.checkpoint).image_encoder
    session = onnxruntime.InferenceSession(done.bundle.image_encoder_path, providers=["CPUExecutionProvider"])
    data = next(iter(catalog.images.values())).read_bytes()
    pixels_BHW3 = load_pixels(data, encoder.preprocessing, max_pixels=10_000)[None]
    _, query_BD = session.run(None, {"pixel_values": normalise(pixels_BHW3, encoder.preprocessing)})
    np.testing.assert_allclose(query_BD, encoder.encode(pixels_BHW3).image_embedding_BD, atol=1e-4)
    rows_BK, _ = done.bundle.index().search(query_BD, 5)
    assert (rows_BK >= 0).all()


def test_rejects_have_line_and_reason(done: Done) -> None:
    rows = [json.loads(line) for line in (done.config.out.parent / "rejected.jsonl").read_text().splitlines()]
    reasons = {(row["line"], row["reason"].split(":")[0].split(" ")[0]) for row in rows}
    assert len(rows) == 8
    assert {(8, "not"), (9, "`entity_id`"), (10, "entity_id"), (27, "`entity_id`")} <= reasons
    assert sum(row["line"] == 2 for row in rows) == 3
    assert any("images by URL are not fetched" in row["reason"] for row in rows)


def test_a_second_export_has_the_same_bytes_except_times(done: Done, tmp_path: Path) -> None:
    again = dataclasses.replace(done.config, out=tmp_path / "things")
    export_bundle(again)
    first, second = content(done.config.out), content(again.out)
    assert first.keys() == second.keys()
    for name in first:
        if not name.endswith("manifest.json"):
            assert first[name] == second[name], name
    assert Bundle.open(again.out).fingerprint == done.bundle.fingerprint


def test_limit_text_and_name(done: Done, tmp_path: Path) -> None:
    config = dataclasses.replace(done.config, out=tmp_path / "b", limit=7, store_text=True, thumbnail_px=0, name="few")
    export_bundle(config)
    bundle = Bundle.open(config.out)
    assert bundle.name == "few"
    assert bundle.manifest.counts.entities == 7
    assert bundle.manifest.counts.rejected == 0
    with bundle.store() as store:
        text = store.get("Q1").text
        assert text is not None
        assert text.startswith("Thing number 1")
        assert store.thumbnail("Q1") is None


def queries(folder: Path, known: dict[str, bytes], unknown: list[bytes]) -> Path:
    """Write queries with the entities' own images, with other images, and a few bad ones."""
    rows: list[Any] = []
    images = [*known.items(), *(("not in the catalog", data) for data in unknown)]
    for number, (entity_id, data) in enumerate(images):
        (folder / f"{number}.png").write_bytes(data)
        rows.append(
            {"data_id": str(number), "image": f"{number}.png", "entity_id": entity_id, "data_split": "val_seen"}
        )
    rows += [{"data_id": "x", "image": "missing.png", "entity_id": "Q1", "data_split": "val_seen"}, {"data_id": "y"}]
    path = folder / "queries.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "{no json"]))
    return path


def noise_png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_validation_fits_confidence(done: Done, catalog: CatalogFiles, tmp_path: Path) -> None:
    known = {entity_id: path.read_bytes() for entity_id, path in list(catalog.images.items())[:12]}
    validation = queries(tmp_path, known, [noise_png(seed) for seed in range(12)])
    config = dataclasses.replace(done.config, out=tmp_path / "out" / "b", validation=validation)
    assert export_bundle(config).calibrated
    bundle = Bundle.open(config.out)
    calibration = bundle.calibration
    assert calibration is not None
    assert calibration.queries == 24
    assert 5 <= calibration.correct <= 12
    assert calibration.unknown == 12
    assert calibration.open_set_model is not None
    assert calibration.open_set_model.landmarks_LD.shape[1] == bundle.manifest.embedding_dim
    answered: dict[bool, list[bool]] = {True: [], False: []}
    session = onnxruntime.InferenceSession(bundle.image_encoder_path, providers=["CPUExecutionProvider"])
    preprocessing = Checkpoint.load(config.checkpoint).image_encoder.preprocessing
    index = bundle.index()
    for is_known, images in ((True, known.values()), (False, [noise_png(seed) for seed in range(12)])):
        for data in images:
            pixels_HW3 = load_pixels(data, preprocessing, max_pixels=10_000)
            _, query_BD = session.run(None, {"pixel_values": normalise(pixels_HW3[None], preprocessing)})
            scores = index.search(query_BD, 10)[1][0].tolist()
            probability = calibration.judge(scores, background(scores), query_BD[0])[1]
            answered[is_known].append(not calibration.abstains(probability))
    assert answered[True].count(True) + answered[False].count(False) > 16
    reasons = (config.out.parent / "rejected.jsonl").read_text()
    assert reasons.count("queries.jsonl: ") == 3


def test_validation_that_cannot_be_fitted_leaves_a_resumable_export(
    done: Done, catalog: CatalogFiles, tmp_path: Path
) -> None:
    validation = queries(tmp_path, {}, [path.read_bytes() for path in catalog.images.values()])
    config = dataclasses.replace(done.config, out=tmp_path / "b", validation=validation)
    with pytest.raises(UserError, match="calibration needs at least 5 right"):
        export_bundle(config)
    assert not (config.out / "manifest.json").exists()
    summary = export_bundle(dataclasses.replace(config, validation=None, resume=True))
    assert summary.resumed_shards == 5
    assert Bundle.open(config.out).calibration is None
    assert not (config.out / OPEN_SET_FILE).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_an_output_with_other_files_is_left_alone(done: Done, tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty \(it has thesis.txt\)"):
        export_bundle(dataclasses.replace(done.config, out=out, resume=resume))
    assert content(out) == {"thesis.txt": b"years of work"}


def test_an_output_that_is_a_file(done: Done, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        export_bundle(dataclasses.replace(done.config, out=tmp_path / "file"))


def test_a_complete_output_is_left_alone(done: Done) -> None:
    before = content(done.config.out)
    with pytest.raises(UserError, match="already has a bundle"):
        export_bundle(done.config)
    summary = export_bundle(dataclasses.replace(done.config, resume=True))
    assert summary.already_complete
    for change in ({"batch_size": 4}, {"limit": 3}, {"name": "other"}, {"store_text": True}):
        with pytest.raises(UserError, match=r"another|named"):
            export_bundle(dataclasses.replace(done.config, resume=True, **change))
    assert content(done.config.out) == before


def test_missing_inputs(done: Done, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for change, error in (
        ({"catalog": nowhere}, CatalogError),
        ({"checkpoint": nowhere}, CheckpointError),
        ({"validation": nowhere}, CatalogError),
    ):
        with pytest.raises(error, match="nowhere"):
            export_bundle(dataclasses.replace(done.config, out=tmp_path / "out", **change))  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()


def test_a_catalog_without_a_usable_record(done: Done, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"title": "no id"}\n')
    with pytest.raises(CatalogError, match="no usable entity record"):
        export_bundle(dataclasses.replace(done.config, catalog=tmp_path / "bad.jsonl", out=tmp_path / "out"))
    export_bundle(dataclasses.replace(done.config, limit=1, out=tmp_path / "out"))  # the failed export left no trace
