"""Bundle swaps under load: no request fails, every answer comes from one bundle, a bad bundle changes nothing."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.generator import service_process
from core.errors import BundleRefused
from index.bundle import Bundle
from service.loaded_bundle import LoadedBundle
from service.recognizer import Recognizer
from service.settings import Settings
from tests.conftest import write_small_bundle
from wikiclip.answers import RecognizeOptions

TIMEOUT_S = 120  # long enough for a busy machine
TOKEN = "change-me"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Three bundles of the same images with different entity ids. `b` has a different encoder."""
    folder = tmp_path_factory.mktemp("swapped")
    write_small_bundle(folder / "a", prefix="a:")
    write_small_bundle(folder / "b", prefix="b:", encoder_seed=12)
    write_small_bundle(folder / "same", prefix="same:")
    return folder


def swap(service, path, headers=ADMIN):
    return service.post("/admin/bundle", json={"path": str(path)}, headers=headers, timeout=TIMEOUT_S)


def recognize(service, image: bytes):
    return service.post("/recognize", content=image, headers={"Content-Type": "image/png"})


def check(answer: httpx.Response, *entity_ids: str) -> str:
    """Check that the whole answer comes from one bundle and return its name."""
    assert answer.status_code == 200, answer.text
    content = answer.json()
    name = content["bundle"].partition("@")[0]
    results = content.get("results", [content])
    assert {result["bundle"] for result in results} == {content["bundle"]}
    # Encoder, index and entity ids all belong to that bundle.
    assert [result["predictions"][0]["entity_id"] for result in results] == [f"{name}:{each}" for each in entity_ids]
    assert all(result["predictions"][0]["score"] > 0.999 for result in results)
    return str(name)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_twenty_swaps_under_load_fail_no_request_and_mix_no_answers(serve, bundles, small_images, cache):
    images = list(small_images.items())
    over = threading.Event()

    def load(number: int) -> list[str]:
        names = []
        with httpx.Client(base_url=service.base_url, timeout=TIMEOUT_S) as client:
            while not over.is_set():
                entity_id, image = images[number % len(images)]
                names.append(check(recognize(client, image), entity_id))
                three = [images[(number + step) % len(images)] for step in range(3)]
                answer = client.post("/recognize/batch", files=[("image", image) for _, image in three])
                names.append(check(answer, *(entity_id for entity_id, _ in three)))
                number += 1
        return names

    with serve(bundles / "a", admin_token=TOKEN, cache=cache) as service, ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load, number) for number in range(4)]
        try:
            for step in range(20):
                name = "ba"[step % 2]
                answer = swap(service, bundles / name)
                assert answer.status_code == 200, answer.text
                assert answer.json()["bundle"].startswith(f"{name}@")
                assert answer.json()["previous"].startswith(f"{'ab'[step % 2]}@")
                entity_id, image = images[step % len(images)]
                assert (
                    check(recognize(service, image), entity_id) == name
                )  # the new bundle answers as soon as the swap has returned
        finally:
            over.set()
        names = [name for each in loads for name in each.result(TIMEOUT_S)]
        metrics = service.get("/metrics").text
    assert set(names) == {"a", "b"}
    assert 'wikiclip_bundle_swaps_total{outcome="loaded"} 20.0' in metrics
    assert metrics.count("\nwikiclip_bundle{") == 1


def test_a_request_in_flight_finishes_with_its_first_bundle(serve, bundles, small_images):
    class GatedEncoder:
        device = "cpu"
        heat_maps = True

        def __init__(self) -> None:
            self.gate = threading.Event()
            self.entered = threading.Semaphore(0)

        def encode(self, pixels_BHW3):
            self.entered.release()
            blank = not pixels_BHW3.any()  # Recognizer checks a new bundle with a blank image
            assert blank or self.gate.wait(TIMEOUT_S)
            return np.ones((len(pixels_BHW3), 16), np.float32)

    encoder, image = GatedEncoder(), small_images["Q140"]
    with serve(bundles / "a", encoder=encoder, admin_token=TOKEN) as service, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(recognize, service, image)
        assert encoder.entered.acquire(timeout=TIMEOUT_S)
        assert swap(service, bundles / "b").status_code == 200
        assert service.get("/info").json()["bundle"].startswith("b@")
        assert not pending.done()
        encoder.gate.set()
        content = pending.result(TIMEOUT_S).json()
        assert content["bundle"].startswith("a@")
        assert all(each["entity_id"].startswith("a:") for each in content["predictions"])
        assert recognize(service, image).json()["bundle"].startswith("b@")


def test_cached_embeddings_survive_a_swap_only_with_the_same_encoder(serve, bundles, small_images):
    image = small_images["Q140"]
    with serve(bundles / "a", admin_token=TOKEN) as service:
        check(recognize(service, image), "Q140")
        assert swap(service, bundles / "same").status_code == 200
        cached = recognize(service, image)
        assert check(cached, "Q140") == "same"
        assert (cached.json()["cached"], "encode" in cached.json()["timings_ms"]) == (True, False)
        assert swap(service, bundles / "b").status_code == 200
        uncached = recognize(service, image)
        assert check(uncached, "Q140") == "b"
        assert uncached.json()["cached"] is False


def altered(bundles, tmp_path):
    shutil.copytree(bundles / "b", tmp_path / "altered")
    content = bytearray((tmp_path / "altered" / "entities.sqlite").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "altered" / "entities.sqlite").write_bytes(content)
    return tmp_path / "altered"


def incomplete(bundles, tmp_path):
    shutil.copytree(bundles / "b", tmp_path / "incomplete")
    (tmp_path / "incomplete" / "index" / "entity.faiss").unlink()
    return tmp_path / "incomplete"


def with_manifest(name, change):
    """Return a function that copies a bundle and changes one of its manifests."""

    def make(bundles, tmp_path):
        shutil.copytree(bundles / "b", tmp_path / "changed")
        path = tmp_path / "changed" / name
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))
        return tmp_path / "changed"

    return make


def endless(bundles, tmp_path):
    """Copy a bundle and replace the records by a view that never ends."""
    path = with_manifest("manifest.json", lambda content: None)(bundles, tmp_path)
    store = path / "entities.sqlite"
    with closing(sqlite3.connect(store)) as connection:
        numbers = "WITH RECURSIVE n (row) AS (SELECT 0 UNION ALL SELECT row + 1 FROM n) SELECT row FROM n"
        connection.executescript(f"DROP TABLE entity; CREATE VIEW entity AS {numbers}")
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"]["entities.sqlite"] = {
        "bytes": store.stat().st_size,
        "sha256": hashlib.sha256(store.read_bytes()).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


WRONG = [
    {"files": {f"{n}\n": 1 for n in range(5000)}},
    {"embedding_dim": "sixteen"},
    {"preprocessing": {}},
    {"preprocessing": {"size_px": []}},
    {"calibration": {"slope": "x"}},
    {"calibration": {"a": {}, "b": []}},
    {"calibration": {}},
    {"model": {"name": []}, "image_encoder": 7},
    {"counts": []},
    {"schema_version": {"x": "y" * 100_000}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_a_manifest_of_wrong_types_is_refused_in_one_line(bundles_service, bundles, tmp_path, wrong):
    refused = swap(
        bundles_service, with_manifest("manifest.json", lambda content: content.update(wrong))(bundles, tmp_path)
    )
    assert refused.status_code == 422
    assert "\n" not in refused.json()["detail"]
    assert len(refused.json()["detail"]) < 1200


@pytest.mark.parametrize("scheme", ["ftp", "http", "https", "gs", "memory", "nothing"])
def test_a_scheme_that_is_not_supported_is_refused_in_one_line(bundles_service, scheme):
    refused = swap(bundles_service, f"{scheme}://127.0.0.1:1/bundle")
    assert refused.status_code == 422
    assert "give a folder, file://... or s3://..." in refused.json()["detail"]


@pytest.fixture(scope="module")
def bundles_service(serve, bundles):
    with serve(bundles / "a", admin_token=TOKEN) as service:
        yield service


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (endless, "the view entity"),
        (
            with_manifest("index/manifest.json", lambda content: content.update(parameters={"k_factor": "x"})),
            "blank image",
        ),
        (altered, "altered"),
        (incomplete, "missing"),
        (lambda bundles, tmp_path: tmp_path / "nowhere", "does not exist"),
        (lambda bundles, tmp_path: tmp_path, "not a bundle"),
        (lambda bundles, tmp_path: "\0", "does not exist"),
    ],
)
def test_a_bad_bundle_is_refused_and_the_old_one_stays(serve, bundles, small_images, tmp_path, make, said):
    with serve(bundles / "a", admin_token=TOKEN) as service:
        refused = swap(service, make(bundles, tmp_path))
        assert refused.status_code == 422
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["title"] == "Bundle refused"
        assert said in refused.json()["detail"]
        assert refused.json()["detail"].endswith(" stays")
        assert check(recognize(service, small_images["Q140"]), "Q140") == "a"
        assert swap(service, bundles / "b").status_code == 200


def test_a_bundle_whose_encoder_fails_is_refused_and_leaves_nothing_behind(serve, bundles, small_images):
    class OnceEncoder:
        device = "cpu"
        works = True

        def encode(self, pixels_BHW3):
            if not self.works:
                raise RuntimeError("out of order")
            return np.ones((len(pixels_BHW3), 16), np.float32)

    encoder = OnceEncoder()
    with serve(bundles / "a", encoder=encoder, admin_token=TOKEN) as service:
        encoder.works = False
        before = threading.active_count()
        assert swap(service, bundles / "b").status_code == 422
        encoder.works = True
        assert recognize(service, small_images["Q140"]).json()["bundle"].startswith("a@")
        assert sum(thread.name == "engine" for thread in threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 422), (b"[]", 422), (b'{"path": ""}', 422), (b'{"path": 3}', 422), (b" " * 100_000, 413)],
)
def test_an_invalid_swap_request_is_refused(serve, bundles, body, status):
    with serve(bundles / "a", admin_token=TOKEN) as service:
        assert service.post("/admin/bundle", content=body, headers=ADMIN).status_code == status


def test_a_swap_needs_the_admin_token(serve, bundles):
    with serve(bundles / "a", admin_token=TOKEN, api_keys=("key",)) as service:
        for headers in ({}, {"X-API-Key": "key"}, {"Authorization": "Bearer key"}):
            assert swap(service, bundles / "b", headers).status_code == 401
        assert swap(service, bundles / "b", {"X-API-Key": TOKEN}).status_code == 200
        assert service.get("/entities/Q140", headers=ADMIN).status_code == 401  # the admin token is not an API key
        assert service.get("/openapi.json").json()["paths"]["/admin/bundle"]["post"]["security"] == [{"admin": []}]
    with serve(bundles / "a") as service:
        assert swap(service, bundles / "b").status_code == 403


def test_sighup_reloads_the_configured_path(bundles, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(bundles / "a")
    command = [sys.executable, "-m", "wikiclip", "serve", "--bundle", str(link), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(line for line in process.stderr if "serving" in line).partition("on ")[2].partition('"')[0]
            with httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=50)) as service:

                def until_answers_from(name: str) -> None:
                    for _ in range(1000):
                        if service.get("/info").json()["bundle"].startswith(f"{name}@"):
                            return
                        time.sleep(0.01)  # another process: polling is the only way to see its state
                    raise AssertionError(f"never answers from {name}")

                until_answers_from("a")
                link.unlink()
                link.symlink_to(bundles / "b")
                os.kill(process.pid, signal.SIGHUP)
                until_answers_from("b")
                link.unlink()
                os.kill(process.pid, signal.SIGHUP)
                assert any("was not reloaded" in line for line in process.stderr)
                assert service.get("/info").json()["bundle"].startswith("b@")
        finally:
            process.terminate()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("live", [False, True])
def test_bundles_that_were_swapped_out_are_freed_without_the_collector(small_bundle, giraffe, tmp_path, live):
    settings = Settings(threads=1, live_dir=tmp_path if live else None)
    old: list[weakref.ref[object]] = []

    async def swap_often(recognizer: Recognizer) -> None:
        for _ in range(12):
            with recognizer.acquire() as view:
                loaded = view.loaded
                old.extend(map(weakref.ref, (loaded, loaded.encoder, loaded.engine, view.entities, view.ranker)))
                answer = await recognizer.recognize(giraffe, RecognizeOptions(types=("animal",)), view)
                assert answer.predictions[0].entity_id == "Q15083"
            del view, loaded
            await recognizer.swap(small_bundle)

    gc.collect()
    gc.disable()
    try:
        with Recognizer.open(small_bundle, settings) as recognizer:
            asyncio.run(swap_often(recognizer))
            for thread in threading.enumerate():
                if thread.name == "retire":
                    thread.join(TIMEOUT_S)
            assert len(old) == 5 * 12
            assert [each() for each in old if each() is not None] == []
    finally:
        gc.enable()


def test_a_refused_bundle_is_freed_without_the_collector(bundles, caplog):
    caplog.set_level(logging.CRITICAL, "wikiclip")  # pytest keeps log records, and with them the errors

    async def swap_in_vain(recognizer: Recognizer) -> None:
        for _ in range(3):
            with pytest.raises(BundleRefused):
                await recognizer.swap(bundles / "b")

    class FailingEncoder:
        device = "cpu"

        def encode(self, pixels_BHW3):
            raise RuntimeError("out of order")

    def count_loaded() -> int:
        return sum(type(each) is LoadedBundle for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        with Recognizer(Bundle.open(bundles / "a"), Settings(threads=1), FailingEncoder()) as recognizer:
            before = count_loaded()
            asyncio.run(swap_in_vain(recognizer))
            assert count_loaded() == before
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_threads_and_files_stay_flat_over_many_swaps():
    bundle = Path(__file__).parents[2] / "demo" / "bundle"

    with service_process(bundle, "--admin-token", TOKEN) as (process, url), httpx.Client(base_url=url) as service:

        def used_after_swaps(count: int) -> tuple[float, int, int]:
            for _ in range(count):
                assert swap(service, bundle).status_code == 200
            proc = Path(f"/proc/{process.pid}")
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            own_mib = int(status["RssAnon"].split()[0]) / 1024
            return own_mib, int(status["Threads"]), len(list((proc / "fd").iterdir()))

        own_mib, threads, files = used_after_swaps(3)
        later_mib, later_threads, later_files = used_after_swaps(15)
    # Bundles that stay take 16 MiB, a thread and a file each. One may be closing at either count.
    assert later_mib < own_mib + 25
    assert later_threads < threads + 8
    assert later_files < files + 8
