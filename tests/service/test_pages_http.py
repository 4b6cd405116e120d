"""Entity records, operations, pages and the API description."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.settings import Settings


def test_an_entity_record(service):
    record = service.get("/entities/Q15083").json()
    assert record["title"] == "Giraffe"
    assert record["titles"] == {"fr": "Girafe", "zh": "长颈鹿"}
    assert record["types"] == ["animal"]
    assert record["has_thumbnail"] is False
    assert "row" not in record
    credit = {"author": "Ann", "licence": "CC BY 4.0", "licence_url": None, "source": "https://example.org/giraffe"}
    assert record["image_credits"] == [credit]
    assert service.get("/entities/Q140").json()["image_credits"] == []


def test_ids_may_contain_reserved_characters(service):
    answer = service.get("/entities/brand%3Aa%26b")
    assert answer.json()["entity_id"] == "brand:a&b"
    thumbnail = service.get("/entities/brand%3Aa%26b/thumbnail")
    assert thumbnail.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (24, 24)


def test_title_search(service):
    found = service.get("/entities", params={"query": "lion", "limit": 1}).json()["entities"]
    assert [entity["entity_id"] for entity in found] == ["Q140"]
    both = service.get("/entities", params={"query": "lion"}).json()["entities"]
    assert {entity["entity_id"] for entity in both} == {"Q140", "Q_no_image"}
    assert {entity["matched_language"] for entity in both} == {None}, "the default titles match"
    (giraffe,) = service.get("/entities", params={"query": "Girafe"}).json()["entities"]
    assert (giraffe["title"], giraffe["matched_language"]) == ("Giraffe", "fr")
    assert service.get("/entities", params={"query": "no such thing"}).json() == {"entities": []}


def test_examples_are_spread_over_the_catalog(service):
    everything = service.get("/examples", params={"limit": 100}).json()["entities"]
    assert len(everything) == 12
    some = service.get("/examples", params={"limit": 3}).json()["entities"]
    assert [each["entity_id"] for each in some] == [everything[row]["entity_id"] for row in (0, 5, 11)]


def test_probes(service):
    assert service.get("/livez").json() == {"status": "alive"}
    assert service.get("/readyz").json() == {"status": "ready"}


def test_an_app_without_asgi_startup_is_alive_but_not_ready(small_bundle: Path, giraffe: bytes) -> None:
    async def statuses() -> list[int]:
        app = create_app(Settings(bundle=small_bundle))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            image = await client.post("/recognize", content=giraffe, headers={"Content-Type": "image/png"})
            assert image.json()["detail"].startswith("the bundle is being loaded")
            metrics = await client.get("/metrics")
            assert "wikiclip_ready 0.0" in metrics.text
            assert 'wikiclip_requests_total{route="/recognize",status="503"} 1.0' in metrics.text
            paths = ("/livez", "/readyz", "/info", "/entities/Q15083")
            return [image.status_code, *[(await client.get(path)).status_code for path in paths]]

    assert asyncio.run(statuses()) == [503, 200, 503, 503, 503]


def test_info(service):
    info = service.get("/info").json()
    assert info["bundle"].startswith("small@")
    assert (info["entities"], info["embeddings"], info["embedding_dim"]) == (12, 14, 16)
    assert info["device"] == "cpu"
    assert info["limits"]["max_batch_images"] == 32
    assert "image/jpeg" in info["image_types"]


def test_metrics_count_requests_images_and_stages(service, giraffe):
    def count(line_start: str) -> float:
        lines = service.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(line_start))

    before = count('wikiclip_requests_total{route="/recognize",status="422"}')
    service.post("/recognize", content=b"no image", headers={"Content-Type": "image/png"})
    assert count('wikiclip_requests_total{route="/recognize",status="422"}') == before + 1
    # An entity id must not create a metric series.
    service.get("/entities/Q123456")
    assert "Q123456" not in service.get("/metrics").text
    service.post("/recognize", params={"top_k": 99}, content=giraffe, headers={"Content-Type": "image/png"})
    assert count("wikiclip_batch_images_count") >= 1
    assert count('wikiclip_stage_seconds_count{stage="search"}') >= 1
    assert count("wikiclip_ready ") == 1


def test_the_api_description_is_complete(service):
    document = service.get("/openapi.json").json()
    assert {
        "/recognize",
        "/recognize/batch",
        "/entities",
        "/entities/{entity_id}",
        "/livez",
        "/readyz",
        "/info",
    } <= set(document["paths"])
    forms = document["paths"]["/recognize"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/jpeg"} <= set(forms)
    problem = document["paths"]["/recognize"]["post"]["responses"]["429"]["content"]
    assert list(problem) == ["application/problem+json"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', service.get("/openapi.json").text))
    assert references <= set(document["components"]["schemas"])


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_other_hosts(service, path):
    answer = service.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', answer.text)
    assert loaded
    for link in loaded:
        assert link.startswith("/"), link
        assert service.get(link).status_code == 200, link
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=", answer.text)  # the policy would block it


def test_the_api_description_lists_problem_types(service):
    undecodable = service.post("/recognize", content=b"x", headers={"Content-Type": "image/png"})
    no_thumbnail = service.get("/entities/nothing/thumbnail")
    document = service.get("/openapi.json").json()
    listed = [each["type"] for each in document["components"]["schemas"]["Problem"]["x-types"]]
    assert undecodable.json()["type"] in listed
    assert no_thumbnail.json()["type"] in listed
