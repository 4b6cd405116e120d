"""A service whose encoder and search run as on a GPU, on the CPU, answers as one that searches with faiss."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

PNG = {"Content-Type": "image/png"}

Ask = Callable[[httpx.Client], httpx.Response]


@pytest.fixture(scope="module", params=["nearest", "mean"])
def services(
    request: pytest.FixtureRequest,
    small_bundle: Path,
    pooled_bundle: Path,
    serve: Callable[..., AbstractContextManager[httpx.Client]],
) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    bundle = small_bundle if request.param == "nearest" else pooled_bundle
    with serve(bundle, cache="off") as faiss, serve(bundle, cache="off", search_device="graph") as graph:
        yield faiss, graph


def same(expected: Any, found: Any) -> None:
    """Numbers may differ by 1e-6; `timings_ms` and `request_id` are left out."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key in expected.keys() - {"timings_ms", "request_id"}:
            same(expected[key], found[key])
    elif isinstance(expected, list):
        assert len(expected) == len(found)
        for each, other in zip(expected, found, strict=True):
            same(each, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-6)
    else:
        assert found == expected


def test_info_says_where_it_searches(services: tuple[httpx.Client, httpx.Client]) -> None:
    infos = [client.get("/info").json() for client in services]
    assert [info["search_device"] for info in infos] == ["cpu", "cpu"]
    assert infos[1]["search_device_why"] == "the graph, as asked for"


@pytest.mark.parametrize(
    "query",
    [
        "top_k=5",
        "top_k=12",
        "top_k=3&type=animal",
        "top_k=3&type=fruit&type=flag",
        "top_k=3&explain=true",
        "top_k=2&box=0.1,0.1,0.6,0.8",
    ],
)
def test_images_get_the_same_answers(
    services: tuple[httpx.Client, httpx.Client], small_images: dict[str, bytes], query: str
) -> None:
    for image in small_images.values():
        expected, found = (client.post(f"/recognize?{query}", content=image, headers=PNG) for client in services)
        assert expected.status_code == 200, expected.text
        same(expected.json(), found.json())


def test_batches_views_and_embeddings_get_the_same_answers(
    services: tuple[httpx.Client, httpx.Client], small_images: dict[str, bytes]
) -> None:
    images = list(small_images.values())
    embedding = np.random.default_rng(0).normal(size=16).tolist()
    encoded = [base64.b64encode(image).decode() for image in images]
    asked: list[Ask] = [
        lambda client: client.post(
            "/recognize/batch", files=[("image", ("a.png", image, "image/png")) for image in images]
        ),
        lambda client: client.post(
            "/recognize", files=[("image", ("a.png", image, "image/png")) for image in images[:3]]
        ),
        lambda client: client.post("/recognize?top_k=4", json={"embedding": embedding}),
        lambda client: client.post("/recognize?type=animal", json={"image": {"base64": encoded[0]}}),
        lambda client: client.post("/embed", content=images[1], headers=PNG),
    ]
    for ask in asked:
        expected, found = (ask(client) for client in services)
        assert expected.status_code == 200, expected.text
        same(expected.json(), found.json())


def test_live_changes_are_found(
    small_bundle: Path,
    small_images: dict[str, bytes],
    tmp_path: Path,
    serve: Callable[..., AbstractContextManager[httpx.Client]],
) -> None:
    token = "a-token-for-this-test"
    embedding = np.random.default_rng(0).normal(size=16).tolist()
    headers = {"Authorization": f"Bearer {token}"}
    with serve(small_bundle, live_dir=tmp_path, admin_token=token, search_device="graph") as client:
        put = client.put("/entities/Q1", json={"title": "New", "embedding": embedding}, headers=headers)
        assert put.status_code == 201, put.text
        assert client.post("/recognize", json={"embedding": embedding}).json()["predictions"][0]["entity_id"] == "Q1"
        answer = client.post("/recognize", content=small_images["Q140"], headers=PNG).json()
        assert answer["predictions"][0]["entity_id"] == "Q140"
