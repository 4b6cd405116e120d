"""`wikiclip export` without a checkpoint: entities get the embeddings of their images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from catalog import EntityRecord, read_catalog
from core.errors import CatalogError, NoEntitySide, UserError
from export.config import ExportConfig
from export.local import ImageEmbedder
from export.pipeline import export_bundle
from imaging import load_pixels
from index.bundle import Bundle
from index.compact import compact
from index.report import describe, describe_lines
from model.encoders import ImageEncoder
from service.recognizer import Recognizer
from service.settings import Settings
from service.updates import EntityRequest
from tests.export.conftest import CatalogFiles
from wikiclip.answers import Recognition


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, image_encoder: ImageEncoder
) -> ExportConfig:
    config = ExportConfig(
        catalog=catalog.path,
        image_encoder=image_encoder.spec,
        out=tmp_path_factory.mktemp("untrained") / "things",
        shard_size=5,
        batch_size=3,
        device="cpu",
        live=True,
    )
    summary = export_bundle(config)
    assert not summary.added_entity_encoder
    return config


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_embeddings_are_those_of_the_images(
    config: ExportConfig, catalog: CatalogFiles, image_encoder: ImageEncoder
) -> None:
    bundle = Bundle.open(config.out, verify="full")
    expected = []
    for row, record in enumerate(item for item in read_catalog(catalog.path) if isinstance(item, EntityRecord)):
        for image in record.images:
            if Path(image).is_file() and "broken" not in image:
                pixels_HW3 = load_pixels(Path(image).read_bytes(), image_encoder.preprocessing, max_pixels=10_000)
                expected.append((row, image_encoder.encode(pixels_HW3[None]).image_embedding_BD.numpy()[0]))
    embeddings = bundle.embeddings()
    assert embeddings.rows_N.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(np.concatenate(list(embeddings)), [each_D for _, each_D in expected], atol=1e-3)
    counts = bundle.manifest.counts
    assert (counts.entities, counts.without_image) == (catalog.entities, catalog.without_image)
    assert bundle.manifest.model["text_encoder"] is None
    assert "text none" in "\n".join(describe_lines(describe(config.out, "quick")))


def test_the_catalog_checks_itself(config: ExportConfig, catalog: CatalogFiles, tmp_path: Path) -> None:
    bundle = Bundle.open(config.out)
    check = bundle.manifest.self_check
    assert check is not None
    several = 2 * 6  # entities with two images
    assert check.left_out.queries == several
    assert check.views.queries == 2 * (len(catalog.images) - 6)
    assert check.left_out.low <= 100 * check.left_out.right / several <= check.left_out.high
    assert len(check.confused) == 5
    assert bundle.calibration is not None or "right predictions" in check.no_confidence
    few = export_bundle(dataclasses.replace(config, out=tmp_path / "few", limit=6))
    assert few.self_check is not None
    assert "and 30 are needed" in few.self_check.no_confidence
    assert not few.calibrated
    with Recognizer.open(tmp_path / "few", Settings(threads=1)) as recognizer:
        (answer,) = recognizer.recognize_many([catalog.images["Q0"].read_bytes()])
    assert isinstance(answer, Recognition)
    assert (answer.predictions[0].entity_id, answer.abstained) == ("Q0", None)


def test_an_interrupted_export_resumes_to_the_same_bytes(
    config: ExportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = dataclasses.replace(config, out=tmp_path / "things")
    embed, chunks = ImageEmbedder.embed, iter(range(3))

    def interrupted(self: ImageEmbedder, chunk):  # type: ignore[no-untyped-def]
        if next(chunks, None) is None:
            raise KeyboardInterrupt
        return embed(self, chunk)

    with monkeypatch.context() as patched:
        patched.setattr(ImageEmbedder, "embed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_bundle(again)
    summary = export_bundle(dataclasses.replace(again, resume=True))
    assert 0 < summary.resumed_shards < summary.shards
    assert files(again.out) == files(config.out)
    assert summary.fingerprint == Bundle.open(config.out).fingerprint
    with pytest.raises(UserError, match="another batch size"):
        export_bundle(dataclasses.replace(again, resume=True, batch_size=4))
    with pytest.raises(UserError, match="another image encoder"):
        export_bundle(dataclasses.replace(again, resume=True, image_encoder="tiny"))


def test_unchanged_entities_are_copied_from_the_base(config: ExportConfig, tmp_path: Path) -> None:
    copied = dataclasses.replace(config, out=tmp_path / "things", base=config.out)
    summary = export_bundle(copied)
    assert summary.copied_entities == summary.counts.entities - 1  # one has an image that does not decode
    assert files(copied.out)["embeddings/00001.npy"] == files(config.out)["embeddings/00001.npy"]


def test_an_entity_is_put_by_its_image(config: ExportConfig, catalog: CatalogFiles, tmp_path: Path) -> None:
    image = catalog.images["Q4"].read_bytes()
    with Recognizer.open(config.out, Settings(threads=1, live_dir=tmp_path / "live")) as recognizer:
        with recognizer.acquire() as held:
            editor = held.loaded.editor
            assert editor is not None
            editor.put("new", EntityRequest(title="New"), [image])
            with pytest.raises(NoEntitySide, match="does not embed texts"):
                editor.put("words", EntityRequest(title="Words", text="Only words."), [])
        with recognizer.acquire() as held:
            exported, put = (held.entities.images_of(held.entities.get(each).row) for each in ("Q4", "new"))
            assert len(held.entities.images_of(held.entities.get("Q3").row)) == 0
            assert held.entities.entity_count == catalog.entities + 1
            image_id = editor.add_image("Q3", image, "").image_id  # it has no image
        with recognizer.acquire() as held:
            assert len(held.entities.images_of(held.entities.get("Q3").row)) == 1
            assert {each.entity_id for each in recognizer.recognize_many([image])[0].predictions} >= {"Q3", "new"}
        with_images = compact(config.out, tmp_path / "live", tmp_path / "compacted")
        with recognizer.acquire() as held:
            editor.live.remove_image("Q3", image_id)
        with recognizer.acquire() as held:
            assert len(held.entities.images_of(held.entities.get("Q3").row)) == 0
            assert held.entities.entity_count == catalog.entities + 1
            editor.live.delete("Q3")
        with recognizer.acquire() as held:
            assert held.entities.entity_count == catalog.entities
    with with_images.store() as store:
        np.testing.assert_allclose(with_images.embeddings().images_of(store.get("Q3").row), put, atol=1e-3)
    np.testing.assert_allclose(put[0], exported[0], atol=2e-3)


def test_what_cannot_be_exported(config: ExportConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "c.jsonl").write_text(json.dumps({"entity_id": "a", "title": "A", "text": "", "images": ["none.png"]}))
    changes: tuple[tuple[dict[str, object], type[UserError], str], ...] = (
        ({"image_encoder": None}, UserError, "give --checkpoint, or --image-encoder"),
        ({"text_encoder": "minilm"}, UserError, "--text-encoder needs --checkpoint"),
        ({"catalog": tmp_path / "c.jsonl"}, CatalogError, r"no entity has a usable image.*rejected.jsonl has the reas"),
    )
    for change, error, message in changes:
        with pytest.raises(error, match=message):
            export_bundle(dataclasses.replace(config, out=out, **change))  # type: ignore[arg-type]
    assert "none.png" in (tmp_path / "rejected.jsonl").read_text()
    assert not out.exists() or not any(out.iterdir())
