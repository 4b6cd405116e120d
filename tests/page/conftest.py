"""A service with the small bundle and one browser session that plays all scenarios."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

HERE = Path(__file__).resolve().parent
READY_TIMEOUT_S = 60
SESSION_TIMEOUT_S = 600

# The files that scenarios use and the entities they show.
QUERY_IMAGES = {"giraffe.png": "Q15083", "lion.png": "Q140", "apple.png": "Q89"}


@pytest.fixture(scope="session")
def service_url(small_bundle: Path) -> Iterator[str]:
    """Run `wikiclip serve` in a process and return its address."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WIKICLIP_")}
    script = str(Path(sys.executable).with_name("wikiclip"))
    command = [script, "serve", "--bundle", str(small_bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        log: list[str] = []
        url = address_in(process.stderr, log)
        # Read the rest of the log: a full pipe would block the service.
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        reader.start()
        try:
            # The service logs its address just before it listens, so connecting may need retries.
            with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=READY_TIMEOUT_S) as client:
                ready = client.get(f"{url}/readyz")
            assert ready.status_code == 200, ready.text
            yield url
        finally:
            process.terminate()
            reader.join()


def address_in(lines: Iterable[str], log: list[str]) -> str:
    """Return the address in the service's log. Fails with the log if there is none."""
    for line in lines:
        log.append(line)
        if found := re.search(r"on (http://127\.0\.0\.1:\d+)", line):
            return found[1]
    pytest.fail(f"the service did not start:\n{''.join(log)}")


@pytest.fixture(scope="session")
def find_chromium() -> Callable[[], str]:
    """Return a function that finds Chromium or fails the test."""
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
    """Play all scenarios of browse.mjs, each in a fresh browser context, and return their findings."""
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
    (folder / "large.png").write_bytes(small_images["Q15083"] + bytes(4096))
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
