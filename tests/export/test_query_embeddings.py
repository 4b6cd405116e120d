"""Embeddings instead of images, as the service's feedback has them, fit confidence and are remembered."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.config import ExportConfig
from export.pipeline import export_bundle
from index.bundle import Bundle
from model.encoders import ImageEncoder
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Embedding

CatalogFiles = Any  # the class is in conftest.py, which cannot be imported


def rows_of(bundle: Path, images: list[tuple[str, bytes]], precision: str) -> list[dict[str, Any]]:
    """Return rows as the service appends them to its file."""
    with Recognizer.open(bundle, Settings(threads=1, precision=precision)) as recognizer:
        rows = []
        for number, (entity_id, found) in enumerate(
            zip([each for each, _ in images], recognizer.embed_many([data for _, data in images]), strict=True)
        ):
            assert isinstance(found, Embedding)
            rows.append(
                {
                    "data_id": f"feedback_{number}", "entity_id": entity_id, "data_split": "feedback",
                    "embedding": list(found.embedding), "encoder": found.encoder,
                }
            )  # fmt: skip
        return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def images(catalog: CatalogFiles) -> list[tuple[str, bytes]]:
    from tests.export.test_pipeline import noise_png

    known = [(entity_id, path.read_bytes()) for entity_id, path in list(catalog.images.items())[:12]]
    return [*known, *(("not in the catalog", noise_png(seed)) for seed in range(12))]


@pytest.fixture
def pictured(images: list[tuple[str, bytes]], tmp_path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, (entity_id, data) in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(data)
        rows.append({"data_id": str(number), "image": f"{number}.png", "entity_id": entity_id, "data_split": "val"})
    return rows


@pytest.mark.parametrize("precision", ["auto", "float"])  # auto is int8
def test_they_fit_the_confidence_that_their_images_fit(
    int8_config: ExportConfig,
    images: list[tuple[str, bytes]],
    pictured: list[dict[str, Any]],
    tmp_path: Path,
    precision: str,
) -> None:
    rows = rows_of(int8_config.out, images, precision)
    bad = [
        {**rows[0], "encoder": "0" * 64}, {**rows[0], "embedding": [1.0]}, {**rows[0], "embedding": None},
        {**rows[0], "entity_id": 5},
    ]  # fmt: skip
    mixed = [*pictured[:3], *rows[3:], *bad]
    calibrations = []
    for name, queries in (("pictured", pictured), ("embedded", mixed)):
        path = write(tmp_path / f"{name}.jsonl", queries)
        export_bundle(dataclasses.replace(int8_config, out=tmp_path / name / "b", validation=path))
        calibrations.append(Bundle.open(tmp_path / name / "b").calibration)
    expected, found = calibrations
    assert expected is not None
    assert found is not None
    assert (found.queries, found.correct, found.unknown) == (24, expected.correct, 12)
    tolerance = 1e-3 if precision == "float" else 0.2
    assert found.slope == pytest.approx(expected.slope, rel=tolerance)
    assert found.abstain_below == pytest.approx(expected.abstain_below, abs=tolerance)
    rejected = [json.loads(line) for line in (tmp_path / "embedded" / "rejected.jsonl").read_text().splitlines()]
    reasons = [each["reason"] for each in rejected if each["reason"].startswith("embedded.jsonl: ")]
    assert len(reasons) == 4
    assert "by the encoder 000" in reasons[0]
    assert "24 finite numbers" in reasons[1]


def test_a_bundle_that_was_calibrated_on_feedback_has_the_same_encoder(
    int8_config: ExportConfig, images: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    path = write(tmp_path / "feedback.jsonl", rows_of(int8_config.out, images, "auto"))
    export_bundle(dataclasses.replace(int8_config, out=tmp_path / "b", validation=path))
    served, calibrated = Bundle.open(int8_config.out).manifest, Bundle.open(tmp_path / "b").manifest
    assert served.calibration is None
    for file in served.image_encoder.files.values():
        assert calibrated.encoder_hash(file) == served.encoder_hash(file)
    assert calibrated.image_encoder.int8 is not None
    assert calibrated.image_encoder.int8.judged_on == "catalog images"  # there are no pixels of the queries


def test_they_are_remembered(catalog: CatalogFiles, image_encoder: ImageEncoder, tmp_path: Path) -> None:
    from tests.export.test_remember import similar

    config = ExportConfig(catalog=catalog.path, image_encoder=image_encoder.spec, out=tmp_path / "things", device="cpu")
    export_bundle(config)
    pictures = [(f"Q{number}", similar(70 + number, view)) for number in (1, 4, 5, 6, 8) for view in range(3)]
    rows = rows_of(config.out, pictures, "float")
    bad = {**rows[0], "encoder": "another"}
    path = write(tmp_path / "pairs.jsonl", [*rows, bad, rows[0]])
    export_bundle(dataclasses.replace(config, out=tmp_path / "out" / "b", remember=path))
    bundle = Bundle.open(tmp_path / "out" / "b")
    assert bundle.manifest.remembered is not None
    assert (bundle.manifest.remembered.entities, bundle.manifest.remembered.pictures) == (5, 15)
    with bundle.store() as store:
        row = store.get("Q5").row
    remembered = bundle.remembered()
    assert remembered is not None
    own_D = np.sum([each["embedding"] for each in rows if each["entity_id"] == "Q5"], axis=0)
    own_D /= np.linalg.norm(own_D)
    assert remembered.score(own_D.astype(np.float32), row) == pytest.approx(1.0 - remembered.handicap, abs=1e-3)
    assert "by the encoder another" in (tmp_path / "out" / "rejected.jsonl").read_text()
