"""PUT and DELETE of entities over HTTP."""

from __future__ import annotations

import base64
import gc
import json
import shutil
import socket
import sqlite3
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from tests.conftest import draw_png, write_small_bundle

TOKEN = "the admin token"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
DIM = 16
WAIT_S = 60  # long enough for a busy machine


@pytest.fixture
def live(serve, small_bundle, tmp_path):
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        yield client


def vector(seed: int) -> list[float]:
    return [float(value) for value in np.random.default_rng([seed, 2]).normal(size=DIM)]


def put(client, entity_id: str, **record):
    return client.put(f"/entities/{entity_id}", json={"title": "A thing", **record}, headers=ADMIN)


def recognized(client, image: bytes, **parameters):
    answer = client.post("/recognize", content=image, headers={"Content-Type": "image/png"}, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def embedding_of(client, small_bundle, image: bytes) -> list[float]:
    from imaging import load_pixels
    from service.recognizer import Recognizer
    from service.settings import Settings

    with Recognizer.open(small_bundle, Settings(threads=1)) as recognizer, recognizer.acquire() as view:
        pixels = load_pixels(image, view.loaded.preprocessing, max_pixels=recognizer.settings.max_pixels)
        return [float(value) for value in view.loaded.engine.submit(pixels, 1).result(WAIT_S).embedding_D]


def test_a_put_entity_is_in_the_next_answer(live, small_bundle, giraffe):
    before = recognized(live, giraffe)
    assert recognized(live, giraffe)["cached"]
    embedding = embedding_of(live, small_bundle, giraffe)
    record = {
        "title": "Okapi", "titles": {"de": "Waldgiraffe"}, "types": ["animal", "forest"], "symbol": "O",
        "text": "It lives in the forest. It is shy.", "url": "https://example.org/okapi", "embedding": embedding,
    }  # fmt: skip
    live.delete("/entities/Q15083", headers=ADMIN).raise_for_status()
    answer = put(live, "Q82037", **record)
    assert answer.status_code == 201
    assert answer.json()["bundle"] == before["bundle"] + "+2"
    assert answer.json()["description"] == "It lives in the forest."
    assert answer.json()["text"] is None  # this bundle stores no texts
    after = recognized(live, giraffe, lang="de")
    assert after["bundle"] == before["bundle"] + "+2"
    assert not after["timings_ms"].keys() & {"encode"}  # the embedding of the image is cached
    first = after["predictions"][0]
    assert (first["entity_id"], first["title"], first["symbol"]) == ("Q82037", "Waldgiraffe", "O")
    assert first["score"] == pytest.approx(1, abs=1e-3)
    assert "Q15083" not in {each["entity_id"] for each in recognized(live, giraffe, top_k=12)["predictions"]}
    assert recognized(live, giraffe, types="forest")["predictions"][0]["entity_id"] == "Q82037"
    assert [each["title"] for each in live.get("/entities", params={"query": "okap"}).json()["entities"]] == ["Okapi"]
    got = live.get("/entities/Q82037").json()
    assert {**got, "bundle": answer.json()["bundle"]} == answer.json()
    assert live.get("/info").json()["entities"] == 12
    assert put(live, "Q82037", **record).status_code == 200


def test_a_put_entity_is_explained(live, small_bundle, giraffe):
    put(live, "Q82037", title="Okapi", text="Shy.", embedding=embedding_of(live, small_bundle, giraffe))
    live.delete("/entities/Q15083", headers=ADMIN).raise_for_status()
    first = recognized(live, giraffe, explain="true")["predictions"][0]
    assert first["entity_id"] == "Q82037"
    assert [len(row) for row in first["explanation"]["heat_map"]] == [4, 4, 4, 4]
    assert first["explanation"]["words"] is None


def test_a_deleted_entity_is_gone(live, giraffe):
    assert live.delete("/entities/Q15083", headers=ADMIN).status_code == 204
    predictions = recognized(live, giraffe, top_k=12)["predictions"]
    assert len(predictions) == 11
    assert "Q15083" not in {each["entity_id"] for each in predictions}
    gone = live.get("/entities/Q15083")
    assert (gone.status_code, gone.json()["type"]) == (404, "/docs#problem-unknown-entity")
    assert live.get("/entities/Q15083/thumbnail").status_code == 404
    again = live.delete("/entities/Q15083", headers=ADMIN)
    assert (again.status_code, again.json()["type"]) == (404, "/docs#problem-unknown-entity")


def test_ids_may_contain_slashes_and_unicode(live):
    for entity_id in ("https://en.wikipedia.org/wiki/A%2FB", "brand:ä & b", "長頸鹿"):
        answer = live.put(f"/entities/{entity_id}", json={"title": "x", "embedding": vector(1)}, headers=ADMIN)
        assert answer.status_code == 201
        assert live.get(f"/entities/{entity_id}").json()["entity_id"] == answer.json()["entity_id"]


@pytest.mark.parametrize(
    ("record", "status", "said"),
    [
        ({"title": "", "embedding": vector(1)}, 422, "title"),
        ({"embedding": vector(1)[:3]}, 422, "16 finite numbers"),
        ({"embedding": [0] * DIM}, 422, "not all of them 0"),
        ({"embedding": [1e308] * DIM}, 422, "finite"),
        ({"embedding": "abc"}, 422, "embedding"),
        ({"embedding": vector(1), "titel": "x"}, 422, "titel"),
        ({"embedding": vector(1), "types": "animal"}, 422, "types"),
        ({"title": "x" * 2001}, 422, "title: String should have at most 2000 characters"),
        ({"text": "x" * 1_000_001}, 422, "text: String should have at most 1000000 characters"),
        ({"types": ["x"] * 101}, 422, "types: List should have at most 100 items"),
        ({"types": ["x" * 501]}, 422, "types.0: String should have at most 500 characters"),
        ({"url": "x" * 4097}, 422, "url: String should have at most 4096 characters"),
        (
            {"titles": dict.fromkeys(map(str, range(1001)), "x")},
            422,
            "titles: Dictionary should have at most 1000 items",
        ),
        ({"titles": {"x" * 5000: "x"}}, 422, "String should have at most 35 characters"),
        ({"titles": {"fr": "x" * 2001}}, 422, "titles.fr: String should have at most 2000 characters"),
        (
            {"titles": dict.fromkeys(map(str, range(101)), "x" * 2000)},
            422,
            "at most 200000 characters in all, not 202000",
        ),
        ({"description": "x" * 5001}, 422, "description: String should have at most 5000 characters"),
        ({"symbol": "x" * 65}, 422, "symbol: String should have at most 64 characters"),
        ({"embedding": [1] * 65_537}, 422, "embedding: List should have at most 65536 items"),
        ({"x" * 5000: 1}, 422, "Extra inputs are not permitted"),
        ({}, 422, "nothing to embed"),
        ({"text": "An animal."}, 422, "send embedding (16 numbers)"),
        ({"image": {"base64": "AAAA"}}, 422, "no entity encoder"),
        ({"image": {"base64": "AAAA"}, "embedding": vector(1)}, 422, "send one of them"),
        ({"image": {"base64": "%"}}, 400, "base64"),
        ({"image": {"url": "https://example.org/x.png"}}, 403, "URL"),
    ],
)
def test_an_invalid_record_is_refused_and_changes_nothing(live, record, status, said):
    answer = put(live, "new", **record)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert said.lower() in answer.json()["detail"].lower()
    assert len(answer.json()["detail"]) < 300
    assert live.get("/entities/new").status_code == 404
    assert "+" not in live.get("/info").json()["bundle"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"null"])
def test_malformed_json_is_refused(live, body):
    headers = {**ADMIN, "Content-Type": "application/json"}
    assert live.put("/entities/new", content=body, headers=headers).status_code in (400, 422)


def test_a_record_may_be_sent_as_a_form(live):
    record = json.dumps({"title": "Form", "embedding": vector(1)})
    answer = live.put("/entities/f", files={"record": (None, record, "application/json")}, headers=ADMIN)
    assert answer.status_code == 201, answer.text
    assert live.put("/entities/f", files={"image": ("x.png", b"x", "image/png")}, headers=ADMIN).status_code == 400
    assert live.put("/entities/f", content=b"x", headers={**ADMIN, "Content-Type": "image/png"}).status_code == 415


def add_image(client, entity_id: str, **body):
    return client.post(f"/entities/{entity_id}/images", json=body, headers=ADMIN)


def image_of(data: bytes) -> dict[str, dict[str, str]]:
    return {"image": {"base64": base64.b64encode(data).decode()}}


def test_an_image_that_is_added_to_an_entity_of_the_bundle_is_found_until_it_is_removed(live, small_images):
    unlike = draw_png(seed=4242)
    before = [recognized(live, unlike, top_k=12)["predictions"], live.get("/entities/Q140").json()]
    assert before[1]["image_ids"] == ["base-0"]
    forms = (
        {"files": {"image": ("x.png", unlike, "image/png")}},
        {"content": unlike, "headers": {**ADMIN, "Content-Type": "image/png"}},
        {"json": image_of(unlike)},
        {"json": {key: live.post("/embed", json=image_of(unlike)).json()[key] for key in ("embedding", "encoder")}},
    )
    for number, form in enumerate(forms):
        answer = live.post("/entities/Q140/images", **{"headers": ADMIN, **form})
        assert answer.status_code == 201, answer.text
        added = answer.json()
        assert (added["entity_id"], added["bundle"]) == ("Q140", f"{live.get('/info').json()['bundle']}")
        first = recognized(live, unlike)["predictions"][0]
        assert (first["entity_id"], first["title"], first["score"]) == ("Q140", "Lion", pytest.approx(1, abs=1e-3))
        assert recognized(live, small_images["Q140"])["predictions"][0]["entity_id"] == "Q140"
        details = live.get("/entities/Q140").json()
        assert details == {**before[1], "image_count": 2, "image_ids": ["base-0", added["image_id"]]}
        url = f"/entities/Q140/images/{added['image_id']}"
        assert live.delete(url, headers=ADMIN).status_code == 204
        assert [recognized(live, unlike, top_k=12)["predictions"], live.get("/entities/Q140").json()] == before
        assert live.delete(url, headers=ADMIN).status_code == 404
        assert added["bundle"].endswith(f"+{2 * number + 1}")


@pytest.mark.parametrize(
    ("entity_id", "request_", "status", "said"),
    [
        ("Q140", {"files": {"other": ("x.png", draw_png(seed=1), "image/png")}}, 400, "no part named image"),
        ("Q140", {"files": [("image", ("x.png", draw_png(seed=1), "image/png"))] * 2}, 400, "2 parts named image"),
        ("Q140", {"files": {"image": ("x.txt", b"some text", "text/plain")}}, 415, "text/plain"),
        ("Q140", {"files": {"image": ("x.png", b"some text", "image/png")}}, 422, "image"),
        ("Q140", {"content": b"some text", "headers": {"Content-Type": "text/plain"}}, 415, "text/plain"),
        ("Q140", {"content": b"", "headers": {"Content-Type": "image/png"}}, 400, "empty"),
        ("Q140", {"json": {"text": "a lion"}}, 400, "image must be"),
        ("Q140", {"json": {"embedding": [1.0] * DIM, "encoder": "0" * 64}}, 409, "has"),
        ("Q140", {"json": {"embedding": [1.0] * (DIM - 1)}}, 422, "16 finite numbers"),
        ("Q140", {"json": {"embedding": [0.0] * DIM}}, 422, "not all of them 0"),
        ("Q140", {"json": {"embedding": [1e308] * DIM}}, 422, "finite"),
        ("Q140", {"json": {"embedding": [1.0] * DIM, "image": {"base64": "AAAA"}}}, 400, "send one of them"),
        ("Q140", {"json": {"image": {"url": "https://example.org/x.png"}}}, 403, "URL"),
        ("nothing", {"json": {"embedding": [1.0] * DIM}}, 404, "no entity"),
        ("nothing", {"files": {"image": ("x.png", draw_png(seed=1), "image/png")}}, 404, "no entity"),
    ],
)
def test_a_bad_image_is_refused_and_changes_nothing(live, entity_id, request_, status, said):
    headers = {**ADMIN, **request_.get("headers", {})}
    answer = live.post(f"/entities/{entity_id}/images", **{**request_, "headers": headers})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    assert said in answer.json()["detail"]
    assert "+" not in live.get("/info").json()["bundle"]


def test_images_that_cannot_be_removed(live):
    put(live, "new", embedding=vector(1)).raise_for_status()
    only = add_image(live, "new", embedding=vector(2)).json()["image_id"]
    for path, status in (
        ("Q140/images/base-0", 409), ("Q140/images/base-1", 404), (f"Q140/images/{only}", 404),
        ("nothing/images/x", 404), (f"new/images/{only}", 204), (f"new/images/{only}", 404),
    ):  # fmt: skip
        assert live.delete(f"/entities/{path}", headers=ADMIN).status_code == status
    assert live.get("/entities/new").json()["image_ids"] == []


def test_ids_with_slashes_have_images(live):
    entity_id = "https://en.wikipedia.org/wiki/A%2FB"
    put(live, entity_id, embedding=vector(1)).raise_for_status()
    image_id = add_image(live, entity_id, embedding=vector(2)).json()["image_id"]
    assert live.get(f"/entities/{entity_id}").json()["image_ids"] == [image_id]
    assert live.delete(f"/entities/{entity_id}/images/{image_id}", headers=ADMIN).status_code == 204
    assert put(live, "a/images/b", embedding=vector(1)).status_code == 422


def test_an_entity_may_be_put_with_several_images(serve, small_bundle, tmp_path):
    images_only = tmp_path / "images only"
    shutil.copytree(small_bundle, images_only)
    manifest = json.loads((images_only / "manifest.json").read_text())
    manifest["model"]["text_encoder"] = None
    (images_only / "manifest.json").write_text(json.dumps(manifest))
    drawn = [draw_png(seed=5000 + number) for number in range(3)]
    parts = [("image", ("x.png", image, "image/png")) for image in drawn]
    record = ("record", (None, json.dumps({"title": "Form"}), "application/json"))
    with serve(images_only, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        answers = [
            client.put("/entities/a", files=[record, *parts], headers=ADMIN),
            put(client, "a", image=[image_of(image)["image"] for image in drawn]),
        ]
        assert [answer.status_code for answer in answers] == [201, 200]
        for answer in answers:
            assert (answer.json()["image_count"], len(set(answer.json()["image_ids"]))) == (3, 3)
        for image in drawn:
            first = recognized(client, image)["predictions"][0]
            assert (first["entity_id"], first["score"]) == ("a", pytest.approx(1, abs=1e-3))
        broken = client.put(
            "/entities/a", files=[record, *parts, ("image", ("x.png", b"x", "image/png"))], headers=ADMIN
        )
        assert (broken.status_code, "image 4 of 4" in broken.json()["detail"]) == (422, True)
        details = {**answers[1].json()}
        del details["bundle"]
        assert client.get("/entities/a").json() == details
        *removed, last = details["image_ids"]
        for image_id in removed:
            assert client.delete(f"/entities/a/images/{image_id}", headers=ADMIN).status_code == 204
        only = client.delete(f"/entities/a/images/{last}", headers=ADMIN)
        assert (only.status_code, "only image" in only.json()["detail"]) == (409, True)
        kept = add_image(client, "a", **image_of(drawn[0])).json()["image_id"]
    with serve(images_only, live_dir=tmp_path / "live") as client:  # after a restart
        assert client.get("/entities/a").json()["image_ids"] == [last, kept]
        assert recognized(client, drawn[0])["predictions"][0]["score"] == pytest.approx(1, abs=1e-3)


def test_changes_need_the_admin_token_and_a_live_dir(live, serve, small_bundle):
    images = "/entities/Q140/images"
    for method, path in (
        ("PUT", "/entities/Q140"), ("DELETE", "/entities/Q140"), ("POST", images), ("DELETE", f"{images}/base-0")
    ):  # fmt: skip
        assert live.request(method, path).status_code == 401
        assert live.request(method, path, headers={"Authorization": "Bearer other"}).status_code == 401
    with serve(small_bundle, admin_token=TOKEN) as fixed:
        answers = (
            put(fixed, "new", embedding=vector(1)),
            fixed.delete("/entities/Q140", headers=ADMIN),
            add_image(fixed, "Q140", embedding=vector(1)),
            fixed.delete(f"{images}/base-0", headers=ADMIN),
        )
    for answer in answers:
        assert answer.status_code == 403
        assert "WIKICLIP_LIVE_DIR" in answer.json()["detail"]


def test_another_service_sees_a_change(live, serve, small_bundle, tmp_path):
    with serve(small_bundle, live_dir=tmp_path / "live") as other:
        put(live, "new", embedding=vector(1)).raise_for_status()
        live.delete("/entities/Q140", headers=ADMIN).raise_for_status()
        # Services look for changes every 0.1 s.
        never = threading.Event()
        for _ in range(WAIT_S * 20):
            if other.get("/info").json()["bundle"].endswith("+2"):
                break
            never.wait(0.05)
        assert other.get("/entities/new").status_code == 200
        assert other.get("/entities/Q140").status_code == 404


def test_changes_past_their_deadline_are_dropped_with_their_records(serve, small_bundle, tmp_path):
    with (
        serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN, deadline_ms=1000) as client,
        closing(sqlite3.connect(tmp_path / "live" / "live.sqlite", isolation_level=None)) as other,
        ThreadPoolExecutor(12) as pool,
    ):
        other.execute("BEGIN IMMEDIATE")  # another process that does not end its change
        tracemalloc.start()
        try:
            text = "x" * 1_000_000
            late = [pool.submit(put, client, f"late{n}", text=text, embedding=vector(n)) for n in range(12)]
            assert [late.pop().result(WAIT_S).status_code for _ in range(12)] == [504] * 12
            gc.collect()  # the client has reference cycles
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held_bytes < 6_000_000  # one change has begun, the others are gone
        other.execute("ROLLBACK")


def test_a_waiting_change_of_a_client_that_left_is_not_made(live, tmp_path):
    def until_in_flight(count: int) -> None:
        never = threading.Event()
        for _ in range(WAIT_S * 20):
            if f"\nwikiclip_in_flight_images {count}.0\n" in live.get("/metrics").text:
                return
            never.wait(0.05)
        raise AssertionError(f"there never were {count} in flight")

    body = json.dumps({"title": "x", "embedding": vector(1)}).encode()
    head = f"PUT /entities/left HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n"
    with (
        closing(sqlite3.connect(tmp_path / "live" / "live.sqlite", isolation_level=None)) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("BEGIN IMMEDIATE")  # another process that is changing entities
        first = pool.submit(put, live, "first", embedding=vector(1))
        until_in_flight(1)
        with socket.create_connection((live.base_url.host, live.base_url.port), WAIT_S) as leaving:
            leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until_in_flight(2)
        until_in_flight(1)
        other.execute("ROLLBACK")
        assert first.result(WAIT_S).status_code == 201
    assert put(live, "last", embedding=vector(1)).status_code == 201
    assert live.get("/entities/left").status_code == 404


def test_a_change_to_a_folder_that_has_disappeared_is_not_acknowledged(live, tmp_path):
    put(live, "kept", embedding=vector(1)).raise_for_status()
    folder, elsewhere = tmp_path / "live", tmp_path / "elsewhere"
    for disappear, appear in (
        (lambda: folder.rename(elsewhere), lambda: elsewhere.rename(folder)),
        (lambda: shutil.rmtree(folder), None),
    ):
        disappear()
        assert put(live, "lost", embedding=vector(2)).status_code == 503
        until_ready(live, False)
        assert "LIVE_DIR has disappeared" in live.get("/readyz").json()["detail"]
        assert live.delete("/entities/Q140", headers=ADMIN).status_code == 503
        assert live.get("/livez").status_code == 200
        if appear is not None:
            appear()
            until_ready(live, True)
            assert live.get("/entities/kept").status_code == 200
            assert live.get("/entities/lost").status_code == 404
    folder.mkdir()
    (folder / "live.sqlite").write_bytes(b"")
    refused = put(live, "lost", embedding=vector(2))
    assert refused.status_code == 503
    assert "restart the service" in refused.json()["detail"]


def until_ready(service, ready: bool) -> None:
    never = threading.Event()
    for _ in range(WAIT_S * 20):
        if (service.get("/readyz").status_code == 200) is ready:
            return
        never.wait(0.05)  # the service looks for changes in a thread of its own
    raise AssertionError(f"ready was never {ready}")


def test_a_service_whose_bundle_has_disappeared_is_not_ready_until_it_is_back(serve, small_bundle, tmp_path, giraffe):
    shutil.copytree(small_bundle, tmp_path / "bundle")
    (tmp_path / "current").symlink_to(tmp_path / "bundle")
    with serve(tmp_path / "current") as service:
        (tmp_path / "current").unlink()  # as before a swap: the bundle itself is still there
        (tmp_path / "bundle").rename(tmp_path / "gone")
        until_ready(service, False)
        assert "the bundle's folder has disappeared" in service.get("/readyz").json()["detail"]
        assert service.get("/entities/Q140").status_code == 503
        assert service.get("/livez").status_code == 200
        (tmp_path / "gone").rename(tmp_path / "bundle")
        until_ready(service, True)
        assert recognized(service, giraffe)["predictions"][0]["entity_id"] == "Q15083"


def test_changes_survive_a_restart_and_a_swap_to_a_foreign_bundle_is_refused(serve, small_bundle, tmp_path):
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        put(client, "new", embedding=vector(1)).raise_for_status()
    other = tmp_path / "other"
    write_small_bundle(other, prefix="other:")
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        assert client.get("/entities/new").json()["title"] == "A thing"
        refused = client.post("/admin/bundle", json={"path": str(other)}, headers=ADMIN)
        assert (refused.status_code, refused.json()["type"]) == (422, "/docs#problem-bundle-refused")
        assert "live changes belong to bundle 'small'" in refused.json()["detail"]
        assert client.get("/entities/new").status_code == 200


def test_a_base64_image_is_decoded(live, giraffe):
    answer = put(live, "new", image={"base64": base64.b64encode(giraffe).decode()})
    assert answer.status_code == 422  # the image is read before the missing entity encoder is noticed
    assert answer.json()["type"] == "/docs#problem-no-entity-side"
