"""Several photographs of one thing in one POST /recognize, `wikiclip recognize --together`, and the clients."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading

import numpy as np
import pytest

import wikiclip
from core.errors import BadParameter, TooLarge, UndecodableImage
from index.bundle import Bundle
from index.calibration import Calibration, OpenSetModel
from index.manifest import MANIFEST_FILE, Manifest
from service.recognizer import Recognizer
from service.settings import Settings
from tests.service.test_cli import run  # noqa: F401
from tests.service.test_updates import ADMIN, TOKEN, put

PNG = {"Content-Type": "image/png"}
NO_IMAGE = b"no image"
CHANGES = ("request_id", "cached", "timings_ms", "skipped")  # between equal answers


def post(client, images, **parameters):
    files = [("image", (f"{number}.png", image, "image/png")) for number, image in enumerate(images)]
    return client.post("/recognize", files=files, params=parameters)


def together(client, *images, **parameters):
    answer = post(client, images, **parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def content(answer):
    return {name: value for name, value in answer.items() if name not in CHANGES}


@pytest.fixture
def three(small_images):
    return [small_images[name] for name in ("Q15083", "Q140", "Q503")]


@pytest.fixture(params=["on", "off"])
def client(request, serve, small_bundle):
    with serve(small_bundle, cache=request.param) as client:
        yield client


def test_the_answer_is_that_of_the_mean_embedding(client, three):
    vectors = [client.post("/embed", content=image, headers=PNG).json()["embedding"] for image in three]
    mean = np.mean(vectors, axis=0).tolist()
    expected = client.post("/recognize", json={"embedding": mean}).json()["predictions"]
    predictions = together(client, *three)["predictions"]
    assert [each["entity_id"] for each in predictions] == [each["entity_id"] for each in expected]
    assert [each["score"] for each in predictions] == pytest.approx([each["score"] for each in expected], abs=2e-6)
    assert predictions[0]["score"] < 0.99  # none of the images alone


def test_neither_order_nor_duplicates_matter(client, three):
    expected = content(together(client, *three))
    for images in itertools.permutations(three):
        assert content(together(client, *images)) == expected
    assert content(together(client, *three, three[1], three[1])) == expected


def test_images_that_do_not_decode_are_skipped_and_named(client, three):
    answer = together(client, NO_IMAGE, three[0], b"", three[1], three[2][: len(three[2]) // 2])
    assert [each["index"] for each in answer["skipped"]] == [0, 2, 4]
    assert all(each["detail"] for each in answer["skipped"])
    assert content(answer) == content(together(client, three[1], three[0]))
    assert together(client, *three)["skipped"] == []


def test_one_usable_image_has_the_answer_of_that_image(client, giraffe):
    single = client.post("/recognize", content=giraffe, headers=PNG).json()
    assert "skipped" not in single
    for images in ((giraffe, giraffe), (NO_IMAGE, giraffe), (giraffe, giraffe, NO_IMAGE)):
        assert content(together(client, *images)) == content(single)


@pytest.mark.parametrize(
    ("count", "parameters", "status", "detail"),
    [
        (9, {}, 413, "9 images of one thing; send at most 8"),
        (40, {}, 413, "parts"),
        (2, {"box": "0,0,0.5,0.5"}, 422, "leave out box"),
        (2, {"explain": "true"}, 422, "leave out box, explain and regions"),
    ],
)
def test_refused(service, giraffe, count, parameters, status, detail):
    answer = post(service, [giraffe] * count, **parameters)
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


def test_none_decodes(client):
    answer = post(client, [NO_IMAGE, b""])
    assert answer.status_code == 422
    assert "none of the 2 images decodes; the first: " in answer.json()["detail"]


def test_filters_and_live_entities(serve, small_bundle, three, tmp_path):
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        animals = together(client, *three, types="animal", top_k=3)["predictions"]
        assert len(animals) == 3
        assert all("animal" in each["types"] for each in animals)
        best = together(client, *three)["predictions"][0]
        assert together(client, *three, min_score=best["score"] + 0.01)["predictions"] == []
        vectors = [client.post("/embed", content=image, headers=PNG).json()["embedding"] for image in three]
        put(client, "Q82037", embedding=np.mean(vectors, axis=0).tolist())
        assert together(client, *three)["predictions"][0]["entity_id"] == "Q82037"
        client.delete("/entities/Q82037", headers=ADMIN).raise_for_status()
        assert together(client, *three)["predictions"][0] == best


def test_the_cache_is_shared_with_single_images(serve, small_bundle, three):
    def lookups():
        lines = client.get("/metrics").text.splitlines()
        found = dict(line.split(" ") for line in lines if line.startswith("wikiclip_cache_lookups_total{"))
        return {name: float(found.get(f'wikiclip_cache_lookups_total{{found="{name}"}}', 0)) for name in names}

    names = ("answer", "embedding", "miss")
    with serve(small_bundle) as client:
        client.post("/recognize", content=three[0], headers=PNG)
        assert not together(client, *three)["cached"]
        assert lookups() == {"answer": 0, "embedding": 1, "miss": 3}
        assert together(client, *reversed(three))["cached"]
        assert lookups() == {"answer": 1, "embedding": 1, "miss": 3}
        assert together(client, *three, top_k=2)["cached"]
        assert lookups() == {"answer": 1, "embedding": 4, "miss": 3}
        again = together(client, NO_IMAGE, *three)
        assert (again["cached"], [each["index"] for each in again["skipped"]]) == (True, [0])
        single = client.post("/recognize", content=three[1], headers=PNG).json()
        assert single["cached"]


def test_all_images_or_none_count_against_the_rate_limit(serve, small_bundle, three):
    with serve(small_bundle, rate_limit="3/hour") as client:
        together(client, *three[:2])
        assert post(client, three[:2]).status_code == 429
        together(client, three[0])
        assert post(client, three[:1]).status_code == 429


def test_all_images_or_none_are_admitted(serve, small_bundle, three, gated_encoder):
    with serve(small_bundle, encoder=gated_encoder, queue_limit=3, max_batch_images=3) as client:
        assert "at most 3" in post(client, [*three, NO_IMAGE]).json()["detail"]
        statuses = []
        waiting = threading.Thread(target=lambda: statuses.append(post(client, three[:2]).status_code))
        waiting.start()
        gated_encoder.entered.acquire()
        refused = post(client, three[1:])
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        gated_encoder.gate.set()
        waiting.join()
        assert statuses == [200]


@pytest.fixture
def fitted_bundle(small_bundle, tmp_path):
    """`small_bundle` with a calibration for two photographs."""
    bundle = tmp_path / "fitted"
    shutil.copytree(small_bundle, bundle)
    manifest = Manifest.read(bundle / MANIFEST_FILE)
    of_two = Calibration(
        slope=1.0, none_offset=-50.0, none_slope=0.0, abstain_below=0.5, queries=30, correct=20, unknown=0,
        open_set_model=OpenSetModel(offset=-2.0, best=0.0, background=0.0),
    )  # fmt: skip
    single = Calibration.from_dict(manifest.calibration)
    changed = Calibration(**{**vars(single), "views": {2: of_two}}).to_dict()
    manifest.model_copy(update={"calibration": changed}).write(bundle / MANIFEST_FILE)
    return bundle


def test_confidence_has_the_fit_of_the_number_of_images(serve, fitted_bundle, small_bundle, three):
    with serve(fitted_bundle) as client, serve(small_bundle) as unfitted:
        for images in (three[:1], [three[0], three[0]], [three[0], NO_IMAGE]):
            assert together(client, *images)["predictions"] == together(unfitted, *images)["predictions"]
        for images in (three[:2], three):  # three have the fit of two
            answer = together(client, *images)
            scores = np.array([each["score"] for each in together(client, *images, top_k=10)["predictions"]])
            expected = np.exp(scores) / np.exp(scores).sum()
            assert [each["confidence"] for each in answer["predictions"]] == pytest.approx(expected[:5], abs=1e-5)
            assert answer["known"] == pytest.approx(1 / (1 + np.exp(2)), abs=1e-6)
            assert answer["abstained"]


def test_the_recogniser_without_http(small_bundle, three):
    with Recognizer(Bundle.open(small_bundle), Settings(threads=1)) as recognizer:
        answer = recognizer.recognize_together([NO_IMAGE, *three])
        assert [each.index for each in answer.skipped] == [0]
        served = asyncio.run(recognizer.recognize_views(three, wikiclip.RecognizeOptions()))
        assert served.predictions == answer.predictions
        with pytest.raises(UndecodableImage, match="none of the 2"):
            recognizer.recognize_together([NO_IMAGE, NO_IMAGE])
        with pytest.raises(TooLarge, match="at most 8"):
            recognizer.recognize_together(three * 3)
        with pytest.raises(BadParameter, match="leave out box"):
            recognizer.recognize_together(three, wikiclip.RecognizeOptions(explain=True))


@pytest.mark.parametrize("way", ["blocking", "async"])
def test_the_clients(service, three, way):
    expected = together(service, *three)["predictions"]
    url, options = str(service.base_url), wikiclip.RecognizeOptions(top_k=2)
    if way == "blocking":
        with wikiclip.Client(url) as client:
            answer = client.recognize_views([NO_IMAGE, *three], options)
            with pytest.raises(wikiclip.TooLarge):
                client.recognize_views(three * 3)
    else:

        async def ask():
            async with wikiclip.AsyncClient(url) as client:
                return await client.recognize_views([NO_IMAGE, *three], options)

        answer = asyncio.run(ask())
    assert [each.index for each in answer.skipped] == [0]
    assert [each.model_dump(mode="json") for each in answer.predictions] == expected[:2]


@pytest.mark.parametrize("way", ["--bundle", "--url"])
def test_the_command(run, service, small_bundle, three, tmp_path, way):  # noqa: F811
    place = str(small_bundle if way == "--bundle" else service.base_url)
    expected = together(service, *three)["predictions"]
    for number, image in enumerate([*three, NO_IMAGE, b""]):
        (tmp_path / f"{number}.png").write_bytes(image)
    ended = run("recognize", tmp_path, "--together", way, place, "--json")
    assert ended.returncode == 0, ended.stderr
    row = json.loads(ended.stdout)
    assert row["images"] == [str(tmp_path / f"{number}.png") for number in range(5)]
    assert [each["index"] for each in row["skipped"]] == [3, 4]
    assert [each["entity_id"] for each in row["predictions"]] == [each["entity_id"] for each in expected]
    assert f"{tmp_path / '3.png'}: " in ended.stderr
    assert f"{tmp_path / '4.png'}: " in ended.stderr
    ended = run("recognize", tmp_path, "--together", way, place)
    assert expected[0]["title"] in ended.stdout
    assert "3 images recognised together, 2 skipped" in ended.stderr
    for arguments, reason in (
        ((tmp_path / "3.png", tmp_path / "4.png"), "none of the 2 images decodes"),
        ((tmp_path, "--explain"), "leave out box, explain and regions"),
        ((tmp_path, tmp_path), "at most 8"),
    ):
        ended = run("recognize", *arguments, "--together", way, place)
        assert ended.returncode == 2
        assert reason in ended.stderr
