"""`wikiclip bench faults`: what goes wrong in service, under load, and every answer checked.

While a few clients ask for images whose answers are known: Redis is killed and started again, the bundle is swapped to
and fro, the engine thread is killed, three in ten clients leave before they are answered, and hostile bodies come in
between. `wrong` counts answers that differ from what was answered before, `failed` requests of those clients that were
not answered with 200, `faults` answers of 500 and more to hostile bodies. Needs redis-server.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.server import ANSWERED, free_port, scrape_metrics, service_process
from benchmarks.synthetic import hostile_bodies, photograph
from core.errors import UserError

CLIENTS, IMAGES = 4, 12
BODIES, SMOKE_BODIES = 10_000, 300
SWAPS, SMOKE_SWAPS = 20, 4
KILLS, SMOKE_KILLS = 5, 2
LEAVING = 0.3
TOKEN = "benchmark"
TIMEOUT_S = 60


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """For each fault what was asked and what came of it; all of `wrong`, `failed` and `faults` should be 0."""
    if shutil.which("redis-server") is None:
        raise UserError("redis-server is not installed; `apt-get install redis-server` brings it")
    images = [photograph(number, 320, 240) for number in range(IMAGES)]
    parts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, _Redis(folder) as redis:
        other = Path(folder) / "other"
        shutil.copytree(bundle_path, other)
        flags = ("--redis-url", redis.url, "--admin-token", TOKEN, "--threads", "1", "--log-level", "error")
        with service_process(bundle_path, *flags, module="benchmarks.mortal_service") as (process, url):
            load = _Load(url, images)

            def restart_redis() -> None:
                for _ in range(SMOKE_KILLS if smoke else KILLS):
                    redis.kill()
                    time.sleep(1)  # the time it is gone, under load
                    redis.start()
                    time.sleep(2.5)  # longer than the service leaves it alone after a failure

            def swap() -> None:
                for number in range(SMOKE_SWAPS if smoke else SWAPS):
                    path = other if number % 2 == 0 else bundle_path
                    httpx.post(
                        f"{url}/admin/bundle", json={"path": str(path.resolve())}, timeout=TIMEOUT_S,
                        headers={"Authorization": f"Bearer {TOKEN}"},
                    ).raise_for_status()  # fmt: skip

            def kill_engine() -> None:
                for killed in range(SMOKE_KILLS if smoke else KILLS):
                    process.send_signal(signal.SIGUSR1)
                    _wait_for(url, "wikiclip_engine_deaths_total", killed + 1)
                    # What it died of is tried once more, and would be given up if it were killed at that again: by the
                    # time that more are answered than can be on their way, that is over.
                    _wait_for(url, ANSWERED, scrape_metrics(url).get(ANSWERED, 0) + 4 * CLIENTS)

            def harm() -> None:
                parts["hostile bodies"] = _harm(url, SMOKE_BODIES if smoke else BODIES)

            parts["redis killed"] = load.during(restart_redis)
            parts["bundle swapped"] = load.during(swap)
            parts["engine killed"] = load.during(kill_engine)
            parts["clients leave"] = load.during(lambda: time.sleep(3 if smoke else 20), leaving=LEAVING)
            beside = load.during(harm)
            parts["hostile bodies"].update(beside)
    keys = ("wrong", "failed", "faults")
    return {**{key: sum(each.get(key, 0) for each in parts.values()) for key in keys}, "parts": parts}


class _Load:
    """Clients that ask in turn for images, each time a little otherwise so that caches are missed as often as hit."""

    def __init__(self, url: str, images: list[bytes]) -> None:
        self._url, self._images = url, images
        self._address = (httpx.URL(url).host, httpx.URL(url).port)
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            self._expected = [self._ids(client, image, 5) for image in images]

    def during(self, fault: Callable[[], object], leaving: float = 0.0) -> dict[str, int]:
        """What the clients saw while `fault` was at work."""
        over = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(self._ask_until, over, seed, leaving) for seed in range(CLIENTS)]
            try:
                fault()
            finally:
                over.set()
            total = sum((each.result() for each in asking), Counter[str]())
        return {key: total[key] for key in ("answered", "left", "wrong", "failed")}

    def _ask_until(self, over: threading.Event, seed: int, leaving: float) -> Counter[str]:
        chance, seen = random.Random(seed), Counter[str]()
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            while not over.is_set():
                number, top_k = chance.randrange(len(self._images)), chance.randint(1, 5)
                image = self._images[number] + chance.choice((b"", chance.randbytes(8)))
                if chance.random() < leaving:
                    self._leave(image)
                    seen["left"] += 1
                    continue
                try:
                    found = self._ids(client, image, top_k)
                except httpx.HTTPError:
                    seen["failed"] += 1
                    continue
                seen["answered"] += 1
                seen["wrong"] += found != self._expected[number][:top_k]
        return seen

    def _leave(self, image: bytes) -> None:
        """Send a whole request and go before the answer."""
        head = (
            f"POST /recognize HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
        )
        with socket.create_connection(self._address, TIMEOUT_S) as connection:
            connection.sendall(head.encode() + image)

    @staticmethod
    def _ids(client: httpx.Client, image: bytes, top_k: int) -> list[str]:
        headers = {"Content-Type": "image/jpeg"}
        answer = client.post("/recognize", params={"top_k": top_k}, content=image, headers=headers).raise_for_status()
        return [each["entity_id"] for each in answer.json()["predictions"]]


def _wait_for(url: str, metric: str, value: float) -> None:
    """Return when a metric of the service has come to `value`. Raises `UserError` if it does not."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if scrape_metrics(url).get(metric, 0) >= value:
            return
        time.sleep(0.05)  # between two looks at what only the service knows
    raise UserError(f"{metric} did not come to {value:g} within {TIMEOUT_S} s")


def _harm(url: str, count: int) -> dict[str, Any]:
    """Send hostile bodies; their statuses, and how many of the answers are faults or tell what they should not."""
    statuses: Counter[str] = Counter()
    faults = 0
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for body, content_type in hostile_bodies(count):
            answer = client.post("/recognize", content=body, headers={"Content-Type": content_type})
            statuses[str(answer.status_code)] += 1
            faults += answer.status_code >= 500 or any(leak in answer.text for leak in ("Traceback", ".py", "/home"))
    return {"bodies": count, "statuses": dict(statuses), "faults": faults}


class _Redis:
    """A real redis-server on a port of its own, kept when it is killed and started again."""

    def __init__(self, folder: str) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}/0"
        self._address = ("127.0.0.1", port)
        self._command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]

    def __enter__(self) -> _Redis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + TIMEOUT_S
        while time.monotonic() < until:
            try:
                socket.create_connection(self._address, 1).close()
                return
            except OSError:
                time.sleep(0.02)  # between two looks at a port that does not listen yet
        raise UserError(f"redis-server did not start within {TIMEOUT_S} s")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
