"""A service that is pointed at a URI: at its start, by `POST /admin/bundle`, and by SIGHUP."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import httpx
import pytest

from benchmarks.generator import free_port, wait_until_ready
from index.transfer import push
from tests.conftest import write_small_bundle

TIMEOUT_S = 120
TOKEN = "change-me"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with the bundles a and b, which lie nowhere else."""
    folder = tmp_path_factory.mktemp("store")
    for name in "ab":
        write_small_bundle(folder / "made" / name, prefix=f"{name}:")
        push(folder / "made" / name, f"file://{folder}/pushed/{name}")
    return f"file://{folder}/pushed"


def answered_by(url: str) -> str:
    return str(httpx.get(f"{url}/info", timeout=TIMEOUT_S).json()["bundle"]).partition("@")[0]


def test_a_service_starts_from_a_uri_and_swaps_to_one(store, tmp_path):
    port, cache = free_port(), tmp_path / "cache"
    command = [sys.executable, "-m", "wikiclip", "serve", "--bundle", f"{store}/a", "--bundle-cache", str(cache)]
    service = subprocess.Popen([*command, "--port", str(port), "--admin-token", TOKEN, "--threads", "1"])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(service, url)
        assert answered_by(url) == "a"
        swapped = httpx.post(
            f"{url}/admin/bundle",
            json={"path": f"{store}/b"},
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=TIMEOUT_S,
        )
        assert swapped.status_code == 200, swapped.text
        assert answered_by(url) == "b"
        service.send_signal(signal.SIGHUP)  # back to what it was started with
        deadline = time.monotonic() + TIMEOUT_S
        while answered_by(url) != "a":
            assert time.monotonic() < deadline, "SIGHUP did not bring back the configured bundle"
        assert len([path for path in cache.iterdir() if path.is_dir()]) == 2
    finally:
        service.terminate()
        service.wait(TIMEOUT_S)


def test_a_uri_without_a_bundle_is_refused_and_the_old_one_stays(serve, store, tmp_path):
    with serve(f"{store}/a", admin_token=TOKEN, bundle_cache=tmp_path / "cache") as service:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        refused = service.post("/admin/bundle", json={"path": f"{store}/nowhere"}, headers=headers, timeout=TIMEOUT_S)
        assert refused.status_code == 422
        assert "check the URI" in refused.json()["detail"]
        assert service.get("/info").json()["bundle"].startswith("a@")


def test_a_service_that_cannot_pull_ends_with_one_line(store, tmp_path):
    command = [sys.executable, "-m", "wikiclip", "serve", "--bundle", f"{store}/nowhere", "--port", "0"]
    done = subprocess.run(
        [*command, "--bundle-cache", str(tmp_path)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
