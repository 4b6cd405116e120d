"""`regions=auto`: the things in an image, over HTTP, in the library and on the command line."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import BadParameter
from index.bundle import Bundle
from index.manifest import MANIFEST_FILE, Manifest
from service.recognizer import Recognizer
from service.regions import MAX_REGIONS, choose, propose
from service.settings import Settings
from tests.service.test_cli import run  # noqa: F401
from wikiclip.answers import Prediction, Recognition, RecognizeOptions

DEMO = Path(__file__).parents[2] / "demo"
PNG = {"Content-Type": "image/png"}
CORNERS = ((0.03, 0.03), (0.6, 0.57))  # of the flag on the page
SIDE = 0.37


@pytest.fixture(scope="module")
def page() -> bytes:
    """Two flags of Sweden, the demo's example, on noise."""
    pixels = np.random.default_rng(0).integers(90, 130, (600, 600, 3)).astype(np.uint8)
    page = Image.fromarray(pixels)
    with Image.open(DEMO / "example.jpg") as example:
        flag = example.resize((round(600 * SIDE), round(600 * SIDE)))
    for x, y in CORNERS:
        page.paste(flag, (round(600 * x), round(600 * y)))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def client(serve):
    with serve(DEMO / "bundle", rate_limit="1000/hour") as client:
        yield client


def ask(client, image, **parameters):
    return client.post("/recognize", content=image, headers=PNG, params={"regions": "auto", **parameters})


def overlap(box, other):
    """Return the intersection over the union."""
    sides = [max(0.0, min(box[i] + box[i + 2], other[i] + other[i + 2]) - max(box[i], other[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    return shared / (box[2] * box[3] + other[2] * other[3] - shared)


def without(bundle, folder, **changes):
    """Return a copy of a bundle with changes to its manifest."""
    copy = folder / "changed"
    shutil.copytree(bundle, copy)
    Manifest.read(bundle / MANIFEST_FILE).model_copy(update=changes).write(copy / MANIFEST_FILE)
    return copy


def test_each_thing_is_found_once_where_it_is(client, page):
    regions = ask(client, page).raise_for_status().json()["regions"]
    assert [region["predictions"][0]["title"] for region in regions] == ["Flag of Sweden"] * 2
    for x, y in CORNERS:
        assert max(overlap(region["box"], (x, y, SIDE, SIDE)) for region in regions) > 0.5
    confidences = [region["predictions"][0]["confidence"] for region in regions]
    assert confidences == sorted(confidences, reverse=True)
    assert min(confidences) >= 0.5
    assert all(0 < region["known"] <= 1 for region in regions)


def test_a_region_is_answered_as_the_box_is(client, page):
    for region in ask(client, page, top_k=3, types="flag").raise_for_status().json()["regions"]:
        box = ",".join(map(repr, region["box"]))
        parameters = {"box": box, "top_k": 3, "types": "flag"}
        alone = client.post("/recognize", content=page, headers=PNG, params=parameters).raise_for_status().json()
        assert [each["entity_id"] for each in alone["predictions"]] == [
            each["entity_id"] for each in region["predictions"]
        ]
        for ours, theirs in zip(region["predictions"], alone["predictions"], strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4), "batches of other sizes round otherwise"
            assert "flag" in ours["types"]


def test_the_image_is_answered_as_without_regions(client, page):
    plain = client.post("/recognize", content=page, headers=PNG).raise_for_status().json()
    assert "regions" not in plain
    answer = ask(client, page).raise_for_status().json()
    for name in ("known", "abstained", "level", "predictions"):
        assert answer[name] == plain[name]


def test_a_second_request_is_answered_from_the_cache(client, page):
    fresh, cached = ask(client, page, top_k=7).json(), ask(client, page, top_k=7).json()
    assert (fresh["cached"], cached["cached"]) == (False, True)
    assert cached["regions"] == fresh["regions"]
    assert fresh["timings_ms"]["regions"] > 0


def test_an_image_of_nothing_has_no_regions(client):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), "navy").save(buffer, "PNG")
    answer = ask(client, buffer.getvalue()).raise_for_status().json()
    assert answer["abstained"] is True
    assert answer["regions"] == []


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 2)])
def test_any_shape_is_answered(client, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    assert ask(client, buffer.getvalue()).status_code == 200


def test_what_has_no_regions_is_422(client, page):
    files = [("image", ("a.png", page, "image/png"))] * 2
    vector = client.post("/embed", content=page, headers=PNG).json()["embedding"]
    refusals = {
        "box": ask(client, page, box="0,0,0.5,0.5"),
        "several images": client.post("/recognize?regions=auto", files=files),
        "batch": client.post("/recognize/batch?regions=auto", files=files),
        "embedding": client.post("/recognize?regions=auto", json={"embedding": vector}),
        "other word": ask(client, page, regions="all"),
        "no image": ask(client, b"no image"),
    }
    assert {name: refusal.status_code for name, refusal in refusals.items()} == dict.fromkeys(refusals, 422)
    assert "leave out" in refusals["box"].json()["detail"]
    assert client.get("/readyz").status_code == 200


def test_an_encoder_without_patch_tokens_has_no_regions(serve, tmp_path, page):
    encoder = Manifest.read(DEMO / "bundle" / MANIFEST_FILE).image_encoder
    blind = encoder.model_copy(update={"outputs": (None, encoder.outputs[1])})
    with serve(without(DEMO / "bundle", tmp_path, image_encoder=blind)) as client:
        assert client.get("/info").json()["regions"] is False
        refusal = ask(client, page)
        assert refusal.status_code == 422
        assert "patch tokens" in refusal.json()["detail"]


def test_without_calibration_nothing_is_taken_for_background(serve, tmp_path, page):
    with serve(without(DEMO / "bundle", tmp_path, calibration=None)) as client:
        regions = ask(client, page).raise_for_status().json()["regions"]
    assert 2 < len(regions) <= MAX_REGIONS
    assert {region["known"] for region in regions} == {None}
    scores = [region["predictions"][0]["score"] for region in regions]
    assert scores == sorted(scores, reverse=True)


def test_regions_count_as_images(serve, page):
    with serve(DEMO / "bundle", rate_limit="17/hour") as client:
        assert ask(client, page).status_code == 200
        assert client.post("/recognize", content=page, headers=PNG).status_code == 429


def test_a_short_queue_has_fewer_regions_and_refuses_nothing(page):
    options = RecognizeOptions(regions="auto")
    for queue_limit in (1, 2, 5):
        settings = Settings(queue_limit=queue_limit, max_batch_images=1)
        with Recognizer(Bundle.open(DEMO / "bundle"), settings) as recognizer:
            answers = recognizer.recognize_many([page, b"", page], options)
            assert [getattr(each, "regions", "error") is not None for each in answers] == [True] * 3
            assert isinstance(answers[1], Exception)


def test_several_images_together_have_no_regions(page):
    with (
        Recognizer(Bundle.open(DEMO / "bundle"), Settings()) as recognizer,
        pytest.raises(BadParameter, match="regions"),
    ):
        recognizer.recognize_together([page, page], RecognizeOptions(regions="auto"))


def test_the_command_line_prints_regions(run, tmp_path, page):  # noqa: F811
    (tmp_path / "page.png").write_bytes(page)
    arguments = ("recognize", tmp_path / "page.png", "--bundle", DEMO / "bundle", "--regions")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if " at " in line and "Flag of Sweden" in line]) == 2
    row = json.loads(run(*arguments, "--json").stdout)
    assert len(row["regions"]) == 2


# ---- proposals and the choice among them ----


def tokens(side, things, seed=0):
    """Return patches [P, C] of a background and of things, given as (x, y, width, height) in patches."""
    rng = np.random.default_rng(seed)
    grid = np.tile(rng.normal(size=32), (side, side, 1))
    for x, y, width, height in things:
        grid[y : y + height, x : x + width] = rng.normal(size=32)
    return (grid + 0.05 * rng.normal(size=grid.shape)).astype(np.float32).reshape(side * side, -1)


@pytest.mark.parametrize("side", [8, 16, 24])
def test_what_differs_from_its_surroundings_is_proposed_first(side):
    things = [(0, 0, side // 2, side // 4), (side // 2, side // 2, side * 3 // 8, side * 3 // 8)]
    patches = tokens(side, things)
    boxes = propose(patches, patches[::-1], 2)
    expected = {tuple(value / side for value in thing) for thing in things}
    assert {tuple(round(value, 6) for value in box) for box in boxes} == expected


def test_a_shift_of_half_a_patch_is_undone():
    fine = tokens(16, [(4, 4, 6, 6)]).reshape(16, 16, -1)
    later = np.roll(fine, 1, axis=(0, 1)).reshape(8, 2, 8, 2, -1).mean(axis=(1, 3)).reshape(64, -1)
    earlier = np.roll(fine, -1, axis=(0, 1)).reshape(8, 2, 8, 2, -1).mean(axis=(1, 3)).reshape(64, -1)
    [box] = propose(later, earlier[::-1], 1)
    assert overlap(box, (0.25, 0.25, 0.375, 0.375)) == pytest.approx(1)
    [shifted] = propose(later, later[::-1], 1)
    assert overlap(shifted, (0.25, 0.25, 0.375, 0.375)) < 1


@pytest.mark.parametrize("patches", [1, 2, 3, 50])
def test_patches_without_a_grid_propose_nothing(patches):
    any_PC = np.ones((patches, 4), np.float32)
    assert propose(any_PC, any_PC, 16) == []


def test_equal_patches_and_zeros_propose_something_harmless():
    for value in (0.0, 1.0):
        uniform_PC = np.full((49, 4), value, np.float32)
        assert len(propose(uniform_PC, uniform_PC, 16)) == 16


def ranking(confidence, *, abstained=False, score=0.5):
    best = Prediction(
        rank=1, entity_id="Q1", title="t", score=score, confidence=confidence, description=None, url=None,
        symbol=None, types=(), has_thumbnail=False,
    )  # fmt: skip
    return recognition(best, abstained=abstained)


def recognition(*predictions, abstained=False):
    return Recognition(
        model="m", bundle="b@1", cached=False, predictions=predictions, in_catalog_probability=0.9, abstained=abstained
    )


def test_the_choice_is_certain_known_and_without_overlaps():
    rankings = [
        ((0.0, 0.0, 0.4, 0.4), ranking(0.7)),
        ((0.0, 0.0, 0.5, 0.5), ranking(0.8)),
        ((0.5, 0.5, 0.4, 0.4), ranking(0.9)),
        ((0.0, 0.6, 0.3, 0.3), ranking(0.95, abstained=True)),
        ((0.6, 0.0, 0.3, 0.3), ranking(0.4)),
        ((0.6, 0.1, 0.3, 0.3), recognition()),
    ]
    assert [region.box for region in choose(rankings)] == [(0.5, 0.5, 0.4, 0.4), (0.0, 0.0, 0.5, 0.5)]


def test_at_most_eight_regions_are_chosen():
    boxes = [(x / 10, y / 10, 0.1, 0.1) for x in range(5) for y in range(5)]
    assert len(choose([(box, ranking(None)) for box in boxes])) == MAX_REGIONS == 8
