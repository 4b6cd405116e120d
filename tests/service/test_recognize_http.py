"""POST /recognize and /recognize/batch: what goes in and what comes out."""

from __future__ import annotations

import base64
import io
import uuid

import numpy as np
import onnxruntime
import pytest
from PIL import Image, PngImagePlugin

from imaging import Preprocessing, load_pixels, normalise
from index.bundle import Bundle


def ask(service, image: bytes, **parameters):
    return service.post("/recognize", params=parameters, content=image, headers={"Content-Type": "image/png"})


def never_asked(image: bytes) -> bytes:
    """The same picture in bytes of its own: other tests ask the same service, and it caches answers."""
    note = PngImagePlugin.PngInfo()
    note.add_text("id", uuid.uuid4().hex)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "PNG", pnginfo=note)
    return buffer.getvalue()


def entity_ids(answer) -> list[str]:
    return [prediction["entity_id"] for prediction in answer.json()["predictions"]]


def test_the_three_forms_give_the_same_answer(service, giraffe):
    encoded = base64.b64encode(giraffe).decode()
    answers = [
        service.post("/recognize", content=giraffe, headers={"Content-Type": "image/png"}),
        service.post("/recognize", files={"image": ("giraffe.png", giraffe, "image/png")}),
        service.post("/recognize", files={"image": ("giraffe", giraffe, "application/octet-stream")}),
        service.post("/recognize", json={"image": {"base64": encoded}}),
        service.post("/recognize", json={"image": {"base64": f"data:image/png;base64,{encoded}"}}),
    ]
    assert [answer.status_code for answer in answers] == [200] * 5
    first = answers[0].json()["predictions"]
    assert all(answer.json()["predictions"] == first for answer in answers)
    assert first[0]["entity_id"] == "Q15083"


def test_the_answer_has_the_documented_fields(service, giraffe):
    answer = ask(service, giraffe, top_k=3, min_score=-1)
    content = answer.json()
    fields = {"request_id", "model", "bundle", "cached", "known", "abstained", "level", "predictions", "timings_ms"}
    assert set(content) == fields
    assert content["bundle"].startswith("small@")
    assert content["request_id"] == answer.headers["x-request-id"]
    best = content["predictions"][0]
    assert best["title"] == "Giraffe"
    assert best["symbol"] == "🦒"
    assert best["types"] == ["animal"]
    assert best["has_thumbnail"] is False
    assert best["description"] == "Giraffe, a animal"
    assert best["url"].startswith("https://")
    assert best["score"] == pytest.approx(1, abs=1e-3)
    assert 0.5 < best["confidence"] <= 1
    assert content["abstained"] is False
    assert [each["rank"] for each in content["predictions"]] == [1, 2, 3]
    scores = [each["score"] for each in content["predictions"]]
    assert scores == sorted(scores, reverse=True)


def test_times_are_in_body_and_header(service, small_images):
    answer = ask(service, never_asked(small_images["Q140"]), top_k=2, min_score=-0.9)
    times = answer.json()["timings_ms"]
    assert list(times) == ["decode", "queue", "encode", "search", "total"]
    assert sum(times.values()) <= 2 * times["total"] + 0.01
    header = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert {stage: float(value) for stage, value in header.items()} == times


def test_an_entity_with_several_images_appears_once(service, small_images):
    answer = ask(service, small_images["Q7378"], top_k=100)
    assert len(entity_ids(answer)) == 12
    assert len(set(entity_ids(answer))) == 12


def test_a_second_time_is_cached_and_equal(service, small_images):
    image = never_asked(small_images["Q503"])
    first, second = ask(service, image, top_k=4), ask(service, image, top_k=4)
    other_parameters = ask(service, image, top_k=2)
    assert [answer.json()["cached"] for answer in (first, second, other_parameters)] == [False, True, True]
    assert second.json()["predictions"] == first.json()["predictions"]
    assert other_parameters.json()["predictions"] == first.json()["predictions"][:2]
    assert first.json()["request_id"] != second.json()["request_id"]


def test_no_image_gets_the_answer_of_another(service, small_images):
    for entity_id, image in small_images.items():
        for _ in range(2):
            assert entity_ids(ask(service, image, top_k=1)) == [entity_id]


@pytest.mark.parametrize("types", [["fruit"], ["fruit", "flag"], ["monument"], ["no such type"], ["brand"]])
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_a_type_filter_misses_nothing(service, giraffe, types, top_k):
    everything = ask(service, giraffe, top_k=100).json()["predictions"]
    expected = [each["entity_id"] for each in everything if set(types) & set(each["types"])][:top_k]
    repeated = service.post(
        "/recognize",
        params=[("types", each) for each in types] + [("top_k", top_k)],
        content=giraffe,
        headers={"Content-Type": "image/png"},
    )
    assert entity_ids(repeated) == expected
    assert entity_ids(ask(service, giraffe, top_k=top_k, types=",".join(types))) == expected


def test_min_score_drops_predictions_and_leaves_the_verdict(service, giraffe):
    everything = ask(service, giraffe, top_k=100).json()
    passing = ask(service, giraffe, top_k=100, min_score=0.3).json()
    assert passing["predictions"] == [each for each in everything["predictions"] if each["score"] >= 0.3]
    assert 0 < len(passing["predictions"]) < 12
    doubtful = ask(service, giraffe, types="monument", min_score=1).json()
    assert (doubtful["predictions"], doubtful["abstained"]) == ([], True)


def test_titles_in_a_language_where_there_are(service, giraffe):
    titles = {
        each["entity_id"]: each["title"] for each in ask(service, giraffe, top_k=100, lang="fr").json()["predictions"]
    }
    assert titles["Q15083"] == "Girafe"
    assert titles["Q32789"] == "Zebra"


def test_a_box_asks_about_its_region(service, small_images):
    collage = Image.new("RGB", (96, 40))
    for place, entity_id in enumerate(("Q140", "flag:JP")):
        collage.paste(Image.open(io.BytesIO(small_images[entity_id])), (48 * place, 0))
    buffer = io.BytesIO()
    collage.save(buffer, "PNG")
    assert entity_ids(ask(service, buffer.getvalue(), box="0,0,0.5,1", top_k=1)) == ["Q140"]
    assert entity_ids(ask(service, buffer.getvalue(), box="0.5,0,0.5,1", top_k=1)) == ["flag:JP"]


def test_a_request_id_of_the_client_is_kept_if_it_is_harmless(service, giraffe):
    kept = service.post(
        "/recognize", content=giraffe, headers={"Content-Type": "image/png", "X-Request-ID": "order-66.a"}
    )
    assert kept.json()["request_id"] == "order-66.a"
    hostile = service.get("/livez", headers={"X-Request-ID": "x" * 500})
    assert len(hostile.headers["x-request-id"]) == 32


def test_a_batch_in_order_with_one_bad_image(service, small_images):
    images = [small_images["Q140"], b"no image at all", small_images["flag:BR"], b""]
    files = [("image", (f"{place}.png", image, "image/png")) for place, image in enumerate(images)]
    files.insert(1, ("image", ("notes.txt", b"text", "text/plain")))
    answer = service.post("/recognize/batch", params={"top_k": 1}, files=files)
    assert answer.status_code == 200
    lion, text, broken, brazil, empty = answer.json()["results"]
    assert lion["predictions"][0]["entity_id"] == "Q140"
    assert brazil["predictions"][0]["entity_id"] == "flag:BR"
    assert [problem["status"] for problem in (text, broken, empty)] == [415, 422, 400]
    assert broken["title"] == "Undecodable image"


def test_a_batch_gives_what_single_requests_give(service, small_images):
    images = list(small_images.values())
    batch = service.post("/recognize/batch", files=[("image", image) for image in images]).json()["results"]
    singles = [ask(service, image).json() for image in images]
    assert [each["predictions"] for each in batch] == [each["predictions"] for each in singles]


def test_the_service_agrees_with_a_plain_loop(small_bundle, service, small_images):
    """Decode, encode and search as simply as can be, against what the service answers."""
    bundle = Bundle.open(small_bundle)
    session = onnxruntime.InferenceSession(bundle.image_encoder_path, providers=["CPUExecutionProvider"])
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    embeddings = bundle.embeddings()
    entities = bundle.store()
    for image in small_images.values():
        pixels = normalise(load_pixels(image, preprocessing, max_pixels=10**6)[None], preprocessing)
        (query,) = session.run(["image_embedding"], {"pixel_values": pixels})
        cosines = embeddings.at(np.arange(len(embeddings))) @ query[0]
        best: dict[int, float] = {}
        for row, cosine in zip(embeddings.rows_N, cosines, strict=True):
            best[int(row)] = max(best.get(int(row), -1.0), float(cosine))
        expected = sorted(best, key=lambda row: -best[row])[:5]
        answer = ask(service, image)
        assert entity_ids(answer) == [entity.entity_id for entity in entities.by_rows(expected)]
        scores = [each["score"] for each in answer.json()["predictions"]]
        np.testing.assert_allclose(scores, [best[row] for row in expected], atol=2e-3)
    entities.close()
