"""A real service with the small bundle, and one browser session over its page."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 60
SESSION_TIMEOUT_S = 600

# The names under which scenarios pick their files, and the entities they show.
QUERY_IMAGES = {"giraffe.png": "Q15083", "lion.png": "Q140", "apple.png": "Q89"}


@pytest.fixture(scope="session")
def service_url(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`wikiclip serve` in a process of its own, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log_path = tmp_path_factory.mktemp("service") / "service.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WIKICLIP_")}
    with log_path.open("wb") as log:
        command = [str(Path(sys.executable).with_name("wikiclip")), "serve", "--bundle", str(small_bundle)]
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            wait_until_ready(url, process, log_path)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    # Connecting is retried with growing pauses: 12 tries are about a minute.
    with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=START_TIMEOUT_S) as client:
        try:
            ready = client.get(f"{url}/readyz")
        except httpx.TransportError as error:
            pytest.fail(f"the service did not start ({error}, exit {process.poll()}):\n{log_path.read_text()}")
    assert ready.status_code == 200, f"{ready.text}\n{log_path.read_text()}"


@pytest.fixture(scope="session")
def find_chromium() -> Callable[[], str]:
    """Finds the browser, or fails: a page that nobody looked at is a page that nobody tested."""
    return chromium_path


def chromium_path() -> str:
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("no Chromium: install chromium (`make test` does, as root), or name one in CHROMIUM", pytrace=False)
    return found


@pytest.fixture(scope="session")
def browsed(
    service_url: str,
    small_images: dict[str, bytes],
    find_chromium: Callable[[], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """All scenarios of browse.mjs, played once, one after the other, each in a fresh browser context."""
    chromium = find_chromium()
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules" / "playwright-core").is_dir():
        pytest.fail("node and its packages are not there: run `make setup` (or `make test`)", pytrace=False)
    folder = tmp_path_factory.mktemp("images")
    for name, entity_id in QUERY_IMAGES.items():
        (folder / name).write_bytes(small_images[entity_id])
    (folder / "broken.jpg").write_bytes(
        b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00" + bytes(64)
    )
    (folder / "note.txt").write_text("no image at all\n", encoding="utf-8")
    done = subprocess.run(
        [node, HERE / "browse.mjs", service_url, chromium, folder],
        capture_output=True,
        text=True,
        timeout=SESSION_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"the browser session ended early:\n{done.stderr}"
    report: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return report
