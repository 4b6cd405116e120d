"""A heat map says where: against the slow formula, and over HTTP."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imaging import Preprocessing, load_region
from index.bundle import Bundle
from index.overlay import OverlayView
from index.store import EntityStore, write_store
from service.engine import Found
from service.ranking import Ranker, heat_map
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import AttendedWord, Recognition, RecognizeOptions

EMBEDDING_D = np.ones(16, np.float32)


def test_the_map_is_the_cosine_of_each_patch() -> None:
    rng = np.random.default_rng(0)
    patches, entity = rng.normal(size=(9, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    entity /= np.linalg.norm(entity)
    found = heat_map(patches, entity)
    assert found is not None
    for number, patch in enumerate(patches):
        expected = float(patch @ entity / np.linalg.norm(patch))
        assert found[number // 3][number % 3] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", [(9, 6), (10, 5)])
def test_patches_of_another_width_or_no_square_have_no_map(shape: tuple[int, int]) -> None:
    assert heat_map(np.ones(shape, np.float32), np.ones(5, np.float32)) is None


def test_the_region_is_what_the_pixels_show() -> None:
    """One red column at the edge of the middle square: inside for `shortest`, at the left for a box."""
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 150, 100))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    shared = {"size_px": 32, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    middle = Preprocessing.from_dict({**shared, "resize": "shortest", "crop": "center"})
    squash = Preprocessing.from_dict({**shared, "resize": "squash", "crop": "none"})
    pixels, region = load_region(buffer.getvalue(), middle, max_pixels=10**6)
    assert region == pytest.approx((1 / 3, 0, 1 / 3, 1), abs=0.01)
    assert pixels[16, 2].tolist() == [255, 0, 0]
    assert pixels[16, 30].tolist() == [255, 255, 255]
    assert load_region(buffer.getvalue(), squash, max_pixels=10**6)[1] == (0, 0, 1, 1)
    box = (0.5, 0.25, 0.25, 0.5)
    assert load_region(buffer.getvalue(), squash, max_pixels=10**6, box=box)[1] == pytest.approx(box)


def test_the_best_image_of_the_entity_is_compared(small_bundle: Path, small_images: dict[str, bytes]) -> None:
    options = RecognizeOptions(explain=True, types=("monument", "animal"))
    with Recognizer.open(small_bundle, Settings(threads=1)) as recognizer:
        explained, plain = (
            recognizer.recognize_many([small_images["Q7378"]], each)[0] for each in (options, RecognizeOptions())
        )
        assert isinstance(explained, Recognition)
        assert isinstance(plain, Recognition)
        with recognizer.acquire() as view:
            pixels, region = load_region(small_images["Q7378"], view.loaded.preprocessing, max_pixels=10**6)
            patches = view.loaded.encoder.patch_tokens(pixels[None])[0]
            embedding = view.loaded.encoder.encode(pixels[None])[0]
    best = explained.predictions[0]
    assert best.explanation is not None
    assert best.explanation.region == pytest.approx(region)
    expected = heat_map(patches, embedding)  # the entity's embedding is that of this very image
    assert expected is not None
    assert np.array(best.explanation.heat_map) == pytest.approx(np.array(expected), abs=2e-3)
    assert all(each.explanation is not None for each in explained.predictions)
    assert all(each.explanation is None for each in plain.predictions)


def test_words_are_shown_where_the_bundle_has_texts(
    small_bundle: Path, small_images: dict[str, bytes], tmp_path: Path
) -> None:
    bundle = Bundle.open(small_bundle)
    with bundle.store() as store:
        entities = store.by_rows(range(len(store)))
    text = "The giraffe, tall."
    entities[0] = replace(entities[0], text=text, attended_words=((4, 11, 0.5), (13, 17, 0.25)))
    entities[1] = replace(entities[1], text="Never heard.")
    write_store(tmp_path / "entities.sqlite", ((entity, None) for entity in entities))
    with EntityStore(tmp_path / "entities.sqlite") as store:
        view = OverlayView(bundle.index(), store)
        ranker = Ranker(view, None, "model", "bundle@1")
        rows, scores = view.search(bundle.embeddings().at(np.arange(1)), 12)
        patch_tokens_PC = np.ones((4, 16), np.float32)
        found = Found(embedding_D=EMBEDDING_D, rows=rows[0], scores=scores[0], patch_tokens_PC=patch_tokens_PC)
        explained = ranker.rank(found, RecognizeOptions(top_k=12, explain=True), (0, 0, 1, 1)).predictions
    assert len(explained) == 12
    words = {each.entity_id: each.explanation.words for each in explained if each.explanation}
    assert words.pop("Q15083") == (
        AttendedWord(word="giraffe", start=4, end=11, weight=0.5),
        AttendedWord(word="tall", start=13, end=17, weight=0.25),
    )
    assert set(words.values()) == {None}


def test_explained_and_unexplained_answers_are_not_mixed(service, giraffe) -> None:
    files = {"image": ("g.png", giraffe, "image/png")}

    def ask(**parameters: str) -> dict[str, object]:
        answer = service.post("/recognize", params=parameters, files=files)
        assert answer.status_code == 200
        return answer.json()

    for _ in range(2):
        assert ask()["predictions"][0]["explanation"] is None
        why = ask(explain="true")["predictions"][0]["explanation"]
        assert [len(row) for row in why["heat_map"]] == [4, 4, 4, 4]
    parts = [("image", ("g.png", giraffe, "image/png"))] * 2
    batch = service.post("/recognize/batch", params={"explain": "true"}, files=parts).json()
    assert [each["predictions"][0]["explanation"] for each in batch["results"]] == [why, why]
