"""`wikiclip bench faults`: inject faults into a service under load, and check every answer.

A few clients send images whose answers are known. Meanwhile Redis is killed and restarted, bundles are swapped, the
engine thread is killed, three in ten clients disconnect early, and hostile bodies are sent. `wrong` counts answers that
differ from the first ones, `failed` requests of those clients without a 200, and `faults` hostile bodies that got a
status of 500 or more or a leak. All should be 0. `own_memory_mib` is the service's memory before and after the swaps,
which should differ by little. Needs redis-server.

Then a second service, limited to 1 GiB of memory, is sent images and connections that are valid and extreme
(`benchmarks.extreme`), each case under the same load. See `_measure_extremes`.

`python -m benchmarks.faults serve ...` is `wikiclip serve` with an engine that can be killed by SIGUSR1.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import httpx

from benchmarks import extreme
from benchmarks.generator import ANSWERED, free_port, scrape_metrics, service_process, wait_for
from benchmarks.measure import process_memory_bytes
from benchmarks.synthetic import hostile_bodies, photograph
from core.errors import UserError

CLIENTS, IMAGES, TOP_K = 4, 12, 5
DISCONNECTING_SHARE = 0.3
REDIS_DOWN_S = 1.0
REDIS_UP_S = 2.5  # longer than the service waits before it retries
TOKEN = "benchmark"
TIMEOUT_S = 60
LEAKS = ("Traceback", ".py", "/home")
GROUP_BYTES = 1024**3
RECEIVE_MS = 3000
SMOKE_SHARE = 0.02  # of the size of an extreme image
CALM_S = 60.0  # by when the memory of extreme requests should be free again
CALM_BYTES = 100 * 1024**2
SMOKE_CASES = ("webp_canvas", "jpeg_scans", "png_line", "tiff_fax", "avif_lie", "pipelined", "many_headers")


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return what the clients saw during each fault, and the totals of `wrong`, `failed` and `faults`."""
    if shutil.which("redis-server") is None:
        raise UserError("redis-server is not installed; run `apt-get install redis-server`")
    kills, swaps, bodies, disconnecting_s = (2, 4, 300, 3.0) if smoke else (5, 20, 10_000, 20.0)
    with tempfile.TemporaryDirectory() as folder, _Redis(folder) as redis:
        other_path = Path(folder) / "other"
        shutil.copytree(bundle_path, other_path)
        flags = ("--redis-url", redis.url, "--admin-token", TOKEN, "--threads", "1")
        with service_process(bundle_path, *flags, module="benchmarks.faults") as (process, url):

            def restart_redis() -> None:
                for _ in range(kills):
                    redis.kill()
                    time.sleep(REDIS_DOWN_S)
                    redis.restart()
                    time.sleep(REDIS_UP_S)

            def swap_bundles() -> dict[str, Any]:
                before = _memory_bytes(process.pid)
                for number in range(swaps):
                    path = bundle_path if number % 2 else other_path
                    headers = {"Authorization": f"Bearer {TOKEN}"}
                    body = {"path": str(path.resolve())}
                    httpx.post(f"{url}/admin/bundle", json=body, headers=headers, timeout=TIMEOUT_S).raise_for_status()
                return {"own_memory_mib": [before >> 20, _memory_bytes(process.pid) >> 20]}

            def kill_engine() -> None:
                for number in range(kills):
                    process.send_signal(signal.SIGUSR1)
                    wait_for_metric("wikiclip_engine_deaths_total", number + 1)
                    # The service retries the batch once. Kill again only after it has certainly been answered.
                    wait_for_metric(ANSWERED, scrape_metrics(url).get(ANSWERED, 0) + 4 * CLIENTS)

            def wait_for_metric(name: str, value: float) -> None:
                wait_for(lambda: scrape_metrics(url).get(name, 0) >= value, f"{name} did not reach {value:g}")

            load = _Load(url)
            parts = {
                "redis killed": load.during(restart_redis),
                "bundle swapped": load.during(swap_bundles),
                "engine killed": load.during(kill_engine),
                "clients leave": load.during(
                    partial(time.sleep, disconnecting_s), disconnecting_share=DISCONNECTING_SHARE
                ),
                "hostile bodies": load.during(lambda: _send(url, hostile_bodies(bodies))),
            }
    extremes = _measure_extremes(bundle_path, smoke=smoke)
    every = [*parts.values(), *extremes["cases"].values()]
    totals = {key: sum(part.get(key, 0) for part in every) for key in ("wrong", "failed", "faults")}
    return {**totals, "parts": parts, "extremes": extremes}


def _measure_extremes(bundle_path: Path, *, smoke: bool) -> dict[str, Any]:
    """Return what the clients saw during each extreme case, and what a service limited to 1 GiB took for them all.

    `memory_mib` is the memory of the service and its decoders at the start, at most, and at the end. For each case,
    `livez_ms` is the longest wait for an answer of `/livez`. Each case should get a status from 400 to 429.
    """
    parts: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log, _limited_memory() as group:
        prefix = () if group is None else ("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$0" "$@"')
        flags = ("--log-level", "warning", "--receive-timeout-ms", str(RECEIVE_MS))
        with service_process(bundle_path, *flags, prefix=prefix, stderr=log) as (process, url):
            load = _Load(url)
            start = highest = _memory_bytes(process.pid)
            for name, send in _extremes(url, SMOKE_SHARE if smoke else 1.0):
                if not smoke or name in SMOKE_CASES:
                    watch = _Watch(url, process.pid)
                    parts[name] = load.during(partial(watch.during, send))
                    highest = max(highest, watch.highest_bytes)
            calm_by = time.monotonic() + CALM_S
            while _memory_bytes(process.pid) > start + CALM_BYTES and time.monotonic() < calm_by:
                time.sleep(0.5)
            end = _memory_bytes(process.pid)
            killed = process.poll() is not None
        log_bytes = log.seek(0, os.SEEK_END)
    return {
        "limit_mib": None if group is None else GROUP_BYTES >> 20,
        "killed": killed,
        "memory_mib": [start >> 20, highest >> 20, end >> 20],
        "log_bytes": log_bytes,
        "livez_ms": max(part["livez_ms"] for part in parts.values()),
        "cases": parts,
    }


@contextmanager
def _limited_memory() -> Iterator[Path | None]:
    """Create a cgroup of 1 GiB (version 1 or 2), and remove it when it is empty. Yield None where that is forbidden."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = (root / "memory" if version_1 else root) / f"wikiclip-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(GROUP_BYTES))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "a decoder process did not end")
        group.rmdir()


def _memory_bytes(pid: int) -> int:
    """Return the memory of a process and its children, without mapped files."""
    total = 0
    children = Path(f"/proc/{pid}/task").glob("*/children")
    for each in [pid, *(int(child) for path in children for child in path.read_text().split())]:
        with suppress(OSError):  # it has ended
            total += process_memory_bytes(each)["own"]
    return total


class _Watch:
    """The longest time that `/livez` takes to answer on a connection of its own, and the highest memory."""

    def __init__(self, url: str, pid: int) -> None:
        self._url, self._pid = url, pid
        self._stop = threading.Event()
        self._longest_s, self.highest_bytes = 0.0, 0

    def during(self, send: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the figures of a case, with the longest wait for `/livez`."""
        with ThreadPoolExecutor(2) as pool:
            watching = [pool.submit(each) for each in (self._ask, self._look)]
            try:
                figures = send()
            finally:
                self._stop.set()
            for each in watching:
                each.result()
        return {**figures, "livez_ms": round(1000 * self._longest_s)}

    def _ask(self) -> None:
        while True:
            started_at = time.monotonic()
            httpx.get(f"{self._url}/livez", timeout=TIMEOUT_S).raise_for_status()
            self._longest_s = max(self._longest_s, time.monotonic() - started_at)
            if self._stop.wait(0.05):
                return

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            self.highest_bytes = max(self.highest_bytes, _memory_bytes(self._pid))


def _extremes(url: str, share: float) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the name of each case, and what sends it and counts the responses."""
    target = httpx.URL(url)

    def connect(name: str) -> dict[str, Any]:
        received = extreme.connect(name, target.host, target.port or 80)
        return _counted((status, "") for status in extreme.statuses(received))

    for case in extreme.cases(share):
        bodies = [(body, case.content_type) for body in case.bodies]
        yield case.name, partial(_send, url, bodies, clients=len(bodies))
    for name in extreme.CONNECTIONS:
        yield name, partial(connect, name)


def _send(url: str, bodies: Iterable[tuple[bytes, str]], clients: int = 1) -> dict[str, Any]:
    """POST bodies with their content types, and count the responses."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client, ThreadPoolExecutor(clients) as pool:

        def post(body: bytes, content_type: str) -> tuple[int, str]:
            answer = client.post("/recognize", content=body, headers={"Content-Type": content_type})
            return answer.status_code, answer.text

        return _counted(pool.map(lambda each: post(*each), bodies))


def _counted(responses: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """Return the statuses, and how many responses are server errors or leak internals."""
    statuses: Counter[int] = Counter()
    faults = 0
    for status, text in responses:
        statuses[status] += 1
        faults += status >= HTTPStatus.INTERNAL_SERVER_ERROR or any(leak in text for leak in LEAKS)
    return {"statuses": {str(status): count for status, count in sorted(statuses.items())}, "faults": faults}


class _Load:
    """Clients that send images whose answers are known. Half of the requests miss the cache."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._images = [photograph(number, 320, 240) for number in range(IMAGES)]
        with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
            self._expected = [self._recognize(client, image, TOP_K) for image in self._images]

    def during(self, fault: Callable[[], dict[str, Any] | None], disconnecting_share: float = 0.0) -> dict[str, Any]:
        """Return what the clients saw during `fault`, and the figures that it returns."""
        stop = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._run_client, stop, seed, disconnecting_share) for seed in range(CLIENTS)]
            try:
                figures = fault()
            finally:
                stop.set()
            total = sum((client.result() for client in clients), Counter[str]())
        return {**(figures or {}), **{key: total[key] for key in ("answered", "left", "wrong", "failed")}}

    def _run_client(self, stop: threading.Event, seed: int, disconnecting_share: float) -> Counter[str]:
        rng, counts = random.Random(seed), Counter[str]()
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            while not stop.is_set():
                number, top_k = rng.randrange(IMAGES), rng.randint(1, TOP_K)
                image = self._images[number] + rng.choice((b"", rng.randbytes(8)))
                if rng.random() < disconnecting_share:
                    self._disconnect_early(client.base_url, image)
                    counts["left"] += 1
                    continue
                try:
                    entity_ids = self._recognize(client, image, top_k)
                except httpx.HTTPError:
                    counts["failed"] += 1
                    continue
                counts["answered"] += 1
                counts["wrong"] += entity_ids != self._expected[number][:top_k]
        return counts

    @staticmethod
    def _disconnect_early(url: httpx.URL, image: bytes) -> None:
        """Send a complete request and close the connection before the answer."""
        head = extreme.POST % b"image/jpeg" + b"Content-Length: %d\r\n\r\n" % len(image)
        with socket.create_connection((url.host, url.port), TIMEOUT_S) as connection:
            connection.sendall(head + image)

    @staticmethod
    def _recognize(client: httpx.Client, image: bytes, top_k: int) -> list[str]:
        headers = {"Content-Type": "image/jpeg"}
        answer = client.post("/recognize", params={"top_k": top_k}, content=image, headers=headers).raise_for_status()
        return [each["entity_id"] for each in answer.json()["predictions"]]


class _Redis:
    """A redis-server that keeps its port when it is killed and restarted."""

    def __init__(self, folder: str) -> None:
        self._port, self._folder = free_port(), folder
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def __enter__(self) -> Self:
        options = ("--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", self._folder)
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        with socket.socket() as probe:
            wait_for(lambda: probe.connect_ex(("127.0.0.1", self._port)) == 0, "redis-server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.__enter__()


def main() -> None:
    """Run the command line of `wikiclip`. After SIGUSR1, the next batch kills the engine thread of the service."""
    from service.encoder import OnnxEncoder
    from wikiclip.cli import main as wikiclip_main

    encode = OnnxEncoder.encode
    kill_next = threading.Event()

    def encode_or_die(encoder: OnnxEncoder, pixels_BHW3: Any) -> Any:
        if kill_next.is_set():
            kill_next.clear()
            raise SystemExit("killed by the benchmark")
        return encode(encoder, pixels_BHW3)

    OnnxEncoder.encode = encode_or_die  # type: ignore[method-assign, assignment]
    signal.signal(signal.SIGUSR1, lambda *_: kill_next.set())
    wikiclip_main()


if __name__ == "__main__":
    main()
