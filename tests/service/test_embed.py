"""POST /embed, queries by embedding, and `wikiclip embed`."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

import wikiclip
from tests.service.test_cli import run  # noqa: F401
from tests.service.test_updates import ADMIN, TOKEN, put

PNG = {"Content-Type": "image/png"}


def embedded(client, image: bytes, **parameters):
    answer = client.post("/embed", content=image, headers=PNG, params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


def recognized(client, query, **parameters):
    sent = {"content": query, "headers": PNG} if isinstance(query, bytes) else {"json": query}
    answer = client.post("/recognize", params=parameters, **sent)
    assert answer.status_code == 200, answer.text
    return {name: value for name, value in answer.json().items() if name not in ("request_id", "cached", "timings_ms")}


def test_the_embedding_answers_as_its_image_does(serve, small_bundle, small_images, tmp_path):
    """To the digit: with filters, a region, entities put while serving, and with and without the cache."""
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        for name, image in small_images.items():
            box = {"box": "0.1,0.1,0.5,0.6"} if name == "Q140" else {}
            found = embedded(client, image, **box)
            assert found["dim"] == len(found["embedding"]) == client.get("/info").json()["embedding_dim"]
            assert found["encoder"] == client.get("/info").json()["encoder"]
            assert np.linalg.norm(found["embedding"]) == pytest.approx(1, abs=1e-6)
            query = {"embedding": found["embedding"], "encoder": found["encoder"]}
            assert embedded(client, image, **box)["embedding"] == found["embedding"]  # from the cache
            for options in ({}, {"top_k": 12, "types": "animal"}, {"min_score": 0.2}):
                assert recognized(client, query, **options) == recognized(client, image, **options, **box)
        put(client, "Q82037", embedding=found["embedding"], encoder=found["encoder"])
        client.delete(f"/entities/{name}", headers=ADMIN).raise_for_status()
        assert recognized(client, query) == recognized(client, image)
        assert recognized(client, query)["predictions"][0]["entity_id"] == "Q82037"


def test_all_forms_of_an_image(service, giraffe):
    encoded = base64.b64encode(giraffe).decode()
    answers = [
        service.post("/embed", content=giraffe, headers=PNG),
        service.post("/embed", files={"image": ("giraffe.png", giraffe, "image/png")}),
        service.post("/embed", json={"image": {"base64": encoded}}),
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert len({json.dumps(answer.json()["embedding"]) for answer in answers}) == 1


def test_a_vector_of_any_length_is_normalised(service, giraffe):
    vector = embedded(service, giraffe)["embedding"]
    scaled = recognized(service, {"embedding": [1000 * value for value in vector]})
    assert scaled["predictions"][0]["score"] == pytest.approx(1, abs=1e-3)


ZERO = [0.0] * 16


@pytest.mark.parametrize(
    ("body", "parameters", "status", "detail"),
    [
        ({"embedding": ZERO}, {}, 422, "not all of them 0"),
        ({"embedding": [1.0] * 15}, {}, 422, "16 finite numbers"),
        ({"embedding": [1e300] * 16}, {}, 422, "16 finite numbers"),
        ({"embedding": "1,2"}, {}, 422, "embedding"),
        ({"embedding": [1.0] * 16, "encoder": "another"}, {}, 409, "embed the image again"),
        ({"embedding": [1.0] * 16, "image": {"base64": "eA=="}}, {}, 400, "both image and embedding"),
        ({"embedding": [1.0] * 16, "top_k": 3}, {}, 422, "top_k"),
        ({"embedding": [1.0] * 16}, {"explain": "true"}, 422, "no pixels"),
        ({"embedding": [1.0] * 16}, {"box": "0,0,0.5,0.5"}, 422, "no pixels"),
        ({"embeddings": [1.0] * 16}, {}, 400, "image must be"),
    ],
)
def test_bad_vectors(service, body, parameters, status, detail):
    answer = service.post("/recognize", json=body, params=parameters)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert detail in answer.json()["detail"]


def test_what_cannot_be_embedded(service, giraffe):
    answers = {
        "broken": service.post("/embed", content=giraffe[:40], headers=PNG),
        "blank": service.post("/embed", json={"text": "  "}),
        "text": service.post("/embed", json={"text": "a giraffe"}),
        "box": service.post("/embed", content=giraffe, headers=PNG, params={"box": "0,0,2,2"}),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 422)
    assert "wikiclip export --live" in answers["text"].json()["detail"]


def test_an_entity_by_another_encoder_is_refused(serve, small_bundle, tmp_path):
    with serve(small_bundle, live_dir=tmp_path / "live", admin_token=TOKEN) as client:
        answer = put(client, "Q82037", embedding=[1.0] * 16, encoder="another")
        assert answer.status_code == 409
        assert client.get("/entities/Q82037").status_code == 404


def test_the_client(service, giraffe):
    with wikiclip.Client(str(service.base_url)) as client:
        found = client.embed(giraffe)
        assert found.request_id
        by_image = client.recognize(giraffe).predictions
        assert client.recognize_embedding(found).predictions == by_image
        assert client.recognize_embedding(np.array(found.embedding, np.float32)).predictions == by_image
        other = found.model_copy(update={"encoder": "another"})
        with pytest.raises(wikiclip.Conflict):
            client.recognize_embedding(other)
        with pytest.raises(wikiclip.Unprocessable):
            client.embed_text("a giraffe")


def test_files_of_embeddings(run, service, small_bundle, small_images, tmp_path):  # noqa: F811
    broken, missing = tmp_path / "broken.png", tmp_path / "x" / "y.npy"
    broken.write_bytes(b"\x89PNG")
    files = [broken]
    for name in ("Q140", "Q503"):
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(small_images[name])
    rows = {}
    for way, where in {"bundle": small_bundle, "url": service.base_url}.items():
        out = tmp_path / f"{way}.npy"
        done = run("embed", *files, f"--{way}", where, "--out", out)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (0, f"2 embedded, 1 failed, embeddings in {out}")
        rows[way] = np.load(out)
        assert (rows[way].dtype, rows[way].shape) == (np.float32, (3, 16))
        assert np.isnan(rows[way][0]).all()
        lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
        assert [line["file"] for line in lines] == list(map(str, files))
        assert [line["error"] is None for line in lines] == [False, True, True]
        assert [line["encoder"] for line in lines] == [None, *[service.get("/info").json()["encoder"]] * 2]
    np.testing.assert_allclose(rows["bundle"][1:], rows["url"][1:], atol=1e-6)
    assert rows["url"][1].tolist() == embedded(service, small_images["Q140"])["embedding"]
    for arguments, reason in {
        ("embed", broken, "--bundle", small_bundle, "--out", missing.with_suffix(".txt")): "does not end in .npy",
        ("embed", broken, "--bundle", small_bundle, "--out", missing): "does not exist",
        ("embed", broken, "--bundle", small_bundle, "--out", tmp_path / "n.npy"): "none of 1 image(s) can be embedded",
    }.items():
        refused = run(*arguments)
        assert (refused.returncode, reason in refused.stderr.splitlines()[-1]) == (2, True)
    assert not list(tmp_path.glob("*n.npy*"))
