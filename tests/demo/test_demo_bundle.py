"""The committed demo recognises held-out drawings and was not trained on them."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from demo.build import ADAPTOR_ARTISTS, CATALOG_ROLES, HELD_OUT_ARTISTS, Drawing, is_blank
from demo.bundle import accuracy_table
from demo.entities import Symbol
from demo.icons import fetch_icons, plan_icons
from demo.sources import IconSet, render
from demo.tiny_data import drawings_digest
from export.open_set import outlier_images
from index.bundle import Bundle
from model.encoders.tiny import read_tiny
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Recognition, RecognizeOptions

DEMO = Path(demo.__file__).parent
MAX_BYTES = 16 * 1024 * 1024


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(DEMO / "bundle", verify="full")


def test_the_image_encoder_was_trained_on_the_training_drawings_only(drawings: list[Drawing]) -> None:
    training = [drawing for drawing in drawings if drawing.role == "train"]
    _, _, notes = read_tiny(DEMO / "checkpoint" / "image_encoder.safetensors")
    assert notes["training_drawings"] == len(training)
    assert notes["training_drawings_sha256"] == drawings_digest(training)


def test_the_image_encoder_was_trained_on_the_planned_icons(
    sources: Path, symbols: list[Symbol], drawings: list[Drawing], bundle: Bundle
) -> None:
    package = fetch_icons(sources)
    with bundle.store() as store:
        titles = {symbol.entity_id: symbol.title for symbol in symbols if store.get(symbol.entity_id) is not None}
    planned = plan_icons(package, drawings, titles)
    _, _, notes = read_tiny(DEMO / "checkpoint" / "image_encoder.safetensors")
    assert notes["icons"] == len(planned)
    assert notes["icons_sha256"] == drawings_digest(planned)
    unseen = {drawing.entity_id for drawing in drawings if drawing.split.endswith("unseen")}
    assert unseen
    assert not unseen & {icon.entity_id for icon in planned}
    assert not {*HELD_OUT_ARTISTS, *ADAPTOR_ARTISTS} & {icon.artist for icon in planned}
    page = (DEMO / "icon_sets.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(.+)` \| .+, by .+ \| (.+) \| ([\d,]+) \|$", page, re.MULTILINE)
    about = json.loads((package / "collections.json").read_bytes())
    counts = Counter(icon.artist for icon in planned)
    assert listed == [(name, about[name]["license"]["spdx"], f"{count:,}") for name, count in sorted(counts.items())]


def test_the_adaptor_was_trained_on_clean_and_photographed_drawings(drawings: list[Drawing]) -> None:
    checkpoint = json.loads((DEMO / "checkpoint" / "checkpoint.json").read_bytes())
    assert checkpoint["training"]["pairs"] == 2 * sum(drawing.role in ("train", "adapt") for drawing in drawings)


def test_the_bundle_has_every_catalog_drawing_except_white_ones(
    bundle: Bundle, drawings: list[Drawing], sources: Path
) -> None:
    expected = Counter(drawing.entity_id for drawing in drawings if drawing.role in CATALOG_ROLES)
    rows = Counter(bundle.embeddings().rows_N.tolist())
    with_store = bundle.store()
    try:
        found = {entity.entity_id: rows[row] for row, entity in zip(rows, with_store.by_rows(list(rows)), strict=True)}
    finally:
        with_store.close()
    differing = [d for d in drawings if d.role in CATALOG_ROLES and found[d.entity_id] != expected[d.entity_id]]
    white = [d for d in differing if is_blank(np.asarray(_rendered(d, sources)), on_white=True)]
    assert white
    assert found == expected - Counter(drawing.entity_id for drawing in white)


def test_the_bundle_has_no_text_and_no_artwork(bundle: Bundle, symbols: list[Symbol]) -> None:
    stored = (DEMO / "bundle" / "entities.sqlite").read_bytes()
    giraffe = next(symbol for symbol in symbols if symbol.entity_id == "emoji:1F992")
    assert giraffe.title.encode() in stored
    assert b"tallest living quadruped" in giraffe.knowledge.encode()
    assert b"tallest living quadruped" not in stored
    assert b"<svg" not in stored
    store = bundle.store()
    try:
        assert store.thumbnail("emoji:1F992") is None
    finally:
        store.close()


def test_bundle_and_checkpoint_are_small(bundle: Bundle) -> None:
    for folder in ("bundle", "checkpoint"):
        assert sum(file.stat().st_size for file in (DEMO / folder).rglob("*") if file.is_file()) <= MAX_BYTES
    assert bundle.unlisted_files() == []


def test_it_recognises_drawings_by_held_out_artists(sources: Path, drawings: list[Drawing]) -> None:
    queries = random.Random(0).sample([d for d in drawings if d.role == "query" and d.split.startswith("test")], 120)
    images = [_png(_rendered(query, sources)) for query in queries]
    with Recognizer.open(DEMO / "bundle", Settings(cache="off")) as recognizer:
        answers = recognizer.recognize_many(images, RecognizeOptions(top_k=5))
    ranks = []
    for query, answer in zip(queries, answers, strict=True):
        assert isinstance(answer, Recognition)
        ids = [prediction.entity_id for prediction in answer.predictions]
        ranks.append(ids.index(query.entity_id) if query.entity_id in ids else None)
    # Well below the reported accuracy, and well above that of any broken stage.
    assert sum(rank == 0 for rank in ranks) >= 0.55 * len(ranks)
    assert sum(rank is not None for rank in ranks) >= 0.7 * len(ranks)


def test_images_of_nothing_are_not_in_the_catalog() -> None:
    """Uses plain images, and images of nothing that the model was not fitted to."""
    across = np.linspace(0, 200, 200)
    plainest = [np.full((200, 200, 3), level) for level in (0, 128, 255)]
    plainest.append(np.stack(np.broadcast_arrays(across, across[:, None], 120), axis=-1))
    images = [
        _png(Image.fromarray(pixels.astype(np.uint8))) for pixels in (*plainest, *outlier_images(80, 200, seed=1))
    ]
    with Recognizer.open(DEMO / "bundle", Settings(cache="off")) as recognizer:
        answers = recognizer.recognize_many(images)
    abstained = [isinstance(answer, Recognition) and answer.abstained for answer in answers]
    assert all(abstained[: len(plainest)])
    assert sum(map(bool, abstained)) >= 0.9 * len(abstained)


def _rendered(drawing: Drawing, sources: Path) -> Image.Image:
    return render(IconSet(sources / drawing.artist / "icons.json").svg(drawing.icon))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_readme_of_the_demo_shows_the_figures_of_this_bundle(bundle: Bundle) -> None:
    accuracy = json.loads((DEMO / "accuracy.json").read_bytes())
    assert accuracy["clean"]["bundle"] == accuracy["photo"]["bundle"] == f"{bundle.name}@{bundle.fingerprint}"
    assert accuracy_table(accuracy) in (DEMO / "README.md").read_text(encoding="utf-8")
