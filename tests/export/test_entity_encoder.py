"""`wikiclip export --live`: the service embeds entities as the export does."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.extreme import tiff_fax
from core.errors import BundleAltered, BundleIncomplete, EncoderSpecError, UndecodableImage
from export.config import ExportConfig
from export.entity_encoder import export_entity_encoder
from export.pipeline import export_bundle
from imaging import load_pixels
from index.bundle import Bundle
from index.manifest import ENTITY_ENCODER_FOLDER
from model.checkpoint import Checkpoint
from service import encoder
from service.recognizer import Recognizer
from service.settings import Settings
from service.updates import EntityEmbedder, EntityRequest
from tests.export.conftest import CatalogFiles


@pytest.fixture(scope="module")
def live_bundle(tmp_path_factory: pytest.TempPathFactory, catalog: CatalogFiles, torch_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("live") / "bundle"
    config = ExportConfig(
        catalog=catalog.path, checkpoint=torch_checkpoint, out=out, thumbnail_px=24, device="cpu", int8=True,
        float16=True, progress=True,
    )  # fmt: skip
    with redirect_stderr(io.StringIO()) as shown:
        plain = export_bundle(config)
        # Adding it to a complete bundle changes nothing else.
        added = export_bundle(replace(config, live=True, resume=True))
    assert added.already_complete
    assert added.fingerprint == plain.fingerprint
    stages = ("image encoder", "float16", "int8 embeddings", "entity encoder")
    assert all(f"{stage}: 100%" in shown.getvalue() for stage in stages)
    return out


def test_parity_is_measured_and_recorded(live_bundle: Path) -> None:
    bundle = Bundle.open(live_bundle, "full")
    side = bundle.entity_encoder()
    assert side is not None
    assert set(side.files) == {"adaptor.onnx", "text_encoder.onnx", "tokenizer.json"}
    for parity in side.parity.values():
        assert parity["min_cosine"] > 0.9999
        assert parity["max_abs_diff"] < 1e-3
    assert bundle.unlisted_files() == []
    for name in ("adaptor.onnx", "text_encoder.onnx"):
        assert str(Path.cwd()).encode() not in (live_bundle / ENTITY_ENCODER_FOLDER / name).read_bytes()


def test_an_entity_is_embedded_as_the_export_does(live_bundle: Path, catalog: CatalogFiles) -> None:
    bundle = Bundle.open(live_bundle)
    rows = [json.loads(line) for line in catalog.path.read_text().splitlines() if line.startswith('{"entity_id": "Q')]
    embeddings = bundle.embeddings()
    with (
        bundle.store() as store,
        Recognizer.open(live_bundle, Settings(threads=1, precision="float")) as recognizer,
        recognizer.acquire() as held,
    ):
        side = bundle.entity_encoder()
        assert side is not None
        embedder = EntityEmbedder(bundle, side, held.loaded.encoder)  # type: ignore[arg-type]
        kinds = set()
        for row in rows[10:22]:
            image = catalog.images.get(row["entity_id"])
            pixels = None
            if image is not None:
                pixels = load_pixels(image.read_bytes(), held.loaded.preprocessing, max_pixels=10**6)
            kinds.add((pixels is None, not row["text"]))
            found_D = embedder.embed(pixels, row["text"])
            at = np.flatnonzero(embeddings.rows_N == store.get(row["entity_id"]).row)[:1]
            np.testing.assert_allclose(embeddings.at(at)[0], found_D, atol=2e-3)  # stored as float16
            assert np.linalg.norm(found_D) == pytest.approx(1, abs=1e-5)
        assert len(kinds) >= 3  # text and image, image only, text only


def test_an_entity_put_with_an_image_is_found_by_it(live_bundle: Path, catalog: CatalogFiles, tmp_path: Path) -> None:
    settings = Settings(threads=1, live_dir=tmp_path / "live")
    image = catalog.images["Q4"].read_bytes()
    with Recognizer.open(live_bundle, settings) as recognizer:
        with recognizer.acquire() as held:
            editor = held.loaded.editor
            assert editor is not None
            request = EntityRequest(title="New title", text="Thing number 4 is a thing.")
            _, created = editor.put("new", request, [image])
        assert created
        with recognizer.acquire() as held:
            assert held.entities.thumbnail("new") is not None
            assert held.entities.get("new").title == "New title"
            assert held.entities.get("new").has_thumbnail
            editor.put("words", request, [])
            with pytest.raises(UndecodableImage, match="fax coding"):
                editor.put("fax", request, [tiff_fax(10**6)])
            embedding_D = held.loaded.embed_text(request.text)
            for entity_id in ("words", "Q4"):  # an image is embedded with the text, as if it had been put
                editor.add_image(entity_id, image, request.text)
        with recognizer.acquire() as held:
            assert not held.entities.get("words").has_thumbnail
            put_1D, with_image_2D, of_bundle_ID = (
                held.entities.images_of(held.entities.get(entity_id).row) for entity_id in ("new", "words", "Q4")
            )
    np.testing.assert_allclose(with_image_2D[0], embedding_D, atol=2e-3)
    np.testing.assert_array_equal(with_image_2D[1:], put_1D)
    np.testing.assert_array_equal(of_bundle_ID[-1:], put_1D)
    with Recognizer.open(live_bundle, Settings(threads=1)) as recognizer, recognizer.acquire() as held:
        np.testing.assert_array_equal(held.loaded.embed_text(request.text), embedding_D)


def test_entities_are_embedded_in_float32_when_queries_use_int8_or_float16(
    live_bundle: Path, catalog: CatalogFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog was embedded in float32."""
    row = next(json.loads(line) for line in catalog.path.read_text().splitlines() if '"Q4"' in line)
    settings = Settings(threads=1, live_dir=tmp_path / "live")
    with Recognizer.open(live_bundle, settings) as recognizer:
        with recognizer.acquire() as held:
            assert held.loaded.precision == "int8"
            editor = held.loaded.editor
            assert editor is not None
            request = EntityRequest(title="Again", text=row["text"])
            editor.put("again", request, [catalog.images["Q4"].read_bytes()])
        with recognizer.acquire() as held:
            exported_row, put_row = (held.entities.get(entity_id).row for entity_id in ("Q4", "again"))
            exported_1D, put_1D = held.entities.images_of(exported_row), held.entities.images_of(put_row)
    np.testing.assert_allclose(put_1D[0], exported_1D[0], atol=2e-3)  # stored as float16; int8 differs by 0.01

    opened: list[str] = []

    class OnGpu(encoder.OnnxEncoder):
        def __init__(self, path: Path, *given: Any, **options: Any) -> None:
            super().__init__(path, *given, **{**options, "device": "cpu"})
            opened.append(path.name)
            self.device = "cuda"

    monkeypatch.setattr(encoder, "expected_device", lambda requested: "cuda" if requested == "auto" else requested)
    monkeypatch.setattr(encoder, "OnnxEncoder", OnGpu)
    settings = settings.model_copy(update={"search_device": "cpu"})
    with Recognizer.open(live_bundle, settings) as recognizer, recognizer.acquire() as held:
        assert held.loaded.precision == "float16"
    assert opened == ["image_encoder.float16.onnx", "image_encoder.onnx"]  # queries, entities


def test_an_altered_entity_encoder_is_refused(live_bundle: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    shutil.copytree(live_bundle, altered)
    bundle = Bundle.open(altered)
    adaptor = altered / ENTITY_ENCODER_FOLDER / "adaptor.onnx"
    data = bytearray(adaptor.read_bytes())
    data[len(data) // 2] ^= 1
    adaptor.write_bytes(data)
    with pytest.raises(BundleAltered, match=r"adaptor\.onnx is altered"):
        bundle.entity_encoder()
    adaptor.unlink()
    with pytest.raises(BundleIncomplete, match=r"adaptor\.onnx is missing"):
        bundle.entity_encoder()
    manifest = altered / ENTITY_ENCODER_FOLDER / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "checkpoint_sha256": "other"}))
    with pytest.raises(BundleAltered, match="different checkpoints"):
        bundle.entity_encoder()
    manifest.unlink()
    assert bundle.entity_encoder() is None


def test_a_text_encoder_that_cannot_be_exported_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    loaded = Checkpoint.load(checkpoint)
    object.__setattr__(loaded, "text_encoder", object())
    with pytest.raises(EncoderSpecError, match="omit --live"):
        export_entity_encoder(loaded, tmp_path)
