"""Services that search in Milvus: the same answers, and changes that every host sees."""

from __future__ import annotations

import threading

import pytest
from milvus_lite.server_manager import server_manager_instance

from core.errors import UserError
from index.bundle import Bundle
from index.milvus import Collection, connect
from service.recognizer import Recognizer
from service.settings import Settings, load_settings
from tests.conftest import EMBEDDING_DIM, draw_png

TOKEN = "the admin token"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
WAIT_S = 60


@pytest.fixture
def address(small_bundle, tmp_path):
    path = str(tmp_path / "milvus.db")
    client = connect(path)
    Collection(client, Bundle.open(small_bundle)).load("Flat")
    client.close()
    yield f"milvus:{path}"
    server_manager_instance.release_server(path)


def recognized(client, image: bytes, **parameters):
    answer = client.post("/recognize", content=image, headers={"Content-Type": "image/png"}, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ranking(answer) -> list[tuple[str, float]]:
    return [(each["entity_id"], pytest.approx(each["score"], abs=2e-4)) for each in answer["predictions"]]


def test_answers_are_those_of_the_bundles_own_index(serve, service, small_bundle, address, small_images):
    with serve(small_bundle, index=address, admin_token=TOKEN) as client:
        info = client.get("/info").json()
        assert (info["search_device"], info["entities"]) == ("milvus", 12)
        for image in small_images.values():
            for parameters in ({"top_k": 12}, {"top_k": 3, "types": "fruit"}, {"top_k": 2, "explain": "true"}):
                there, here = recognized(client, image, **parameters), recognized(service, image, **parameters)
                assert ranking(there) == ranking(here)
                assert there["bundle"] == here["bundle"]
        assert client.get("/entities", params={"query": "gir"}).json() == service.get("/entities?query=gir").json()


def test_a_change_at_one_host_is_in_the_answers_of_the_other(serve, small_bundle, address, giraffe):
    with (
        serve(small_bundle, index=address, admin_token=TOKEN) as one,
        serve(small_bundle, index=address) as other,
    ):
        assert recognized(other, giraffe)["predictions"][0]["entity_id"] == "Q15083"
        assert recognized(other, giraffe)["cached"]
        record = {"title": "Okapi", "types": ["animal"], "embedding": [1.0] * EMBEDDING_DIM}
        answer = one.put("/entities/Q82037", json=record, headers=ADMIN)
        assert answer.status_code == 201, answer.text
        assert answer.json()["bundle"].endswith("+1")
        assert one.delete("/entities/Q15083", headers=ADMIN).status_code == 204
        assert one.get("/entities/Q15083").status_code == 404
        asked = until(other, giraffe, "+2")
        found = [each["entity_id"] for each in asked["predictions"]]
        assert "Q15083" not in found
        assert "Q82037" in found
        assert len(found) == 12
        assert other.get("/entities/Q82037").json()["title"] == "Okapi"
        assert other.get("/info").json()["entities"] == 12


def test_an_image_that_is_added_at_one_host_is_found_at_the_other_until_it_is_removed(
    serve, small_bundle, address, small_images
):
    unlike = draw_png(seed=4242)
    with (
        serve(small_bundle, index=address, admin_token=TOKEN) as one,
        serve(small_bundle, index=address) as other,
    ):
        before = recognized(other, unlike, top_k=12)
        image = one.post("/embed", content=unlike, headers={"Content-Type": "image/png"}).json()
        answer = one.post("/entities/Q140/images", json={"embedding": image["embedding"]}, headers=ADMIN)
        assert answer.status_code == 201, answer.text
        image_id = answer.json()["image_id"]
        assert one.get("/entities/Q140").json()["image_ids"] == ["base-0", image_id]
        assert until(other, unlike, "+1")["predictions"][0]["entity_id"] == "Q140"
        assert recognized(other, small_images["Q140"])["predictions"][0]["entity_id"] == "Q140"
        for removed, status in (("base-0", 409), ("0", 404), (image_id, 204), (image_id, 404)):
            assert one.delete(f"/entities/Q140/images/{removed}", headers=ADMIN).status_code == status
        assert ranking(until(other, unlike, "+2")) == ranking(before)
        assert other.get("/entities/Q140").json()["image_ids"] == ["base-0"]


def until(client, image: bytes, version: str):
    """Return the answer for an image from a state that another host has made."""
    waiting = threading.Event()
    for _ in range(10 * WAIT_S):
        answer = recognized(client, image, top_k=12)
        if answer["bundle"].endswith(version):
            return answer
        waiting.wait(0.1)
    raise AssertionError(f"{version} was never seen")


def test_a_bundle_that_is_not_in_milvus_is_not_served(small_bundle, tmp_path):
    path = str(tmp_path / "empty.db")
    with pytest.raises(UserError, match="wikiclip index --backend milvus"):
        Recognizer.open(small_bundle, Settings(index=f"milvus:{path}", threads=1))
    server_manager_instance.release_server(path)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"index": "http://secret@host:1"}, r"index \(WIKICLIP_INDEX\): must begin with milvus:"),
        ({"index": "milvus:http://host:1", "live_dir": "live"}, "remove live_dir"),
    ],
)
def test_settings_that_do_not_go_together(given, reason):
    with pytest.raises(UserError, match=reason) as raised:
        load_settings(**given)
    assert "secret" not in str(raised.value)
