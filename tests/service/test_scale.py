"""The `scale` profile by hand: two services, Redis, and nginx with the file that compose mounts; replicas killed under
load."""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.generator import free_port, wait_until_ready
from benchmarks.synthetic import photograph
from wikiclip import Client, RecognizeOptions

ROOT = Path(__file__).resolve().parents[2]
LOCUSTFILE = ROOT / "benchmarks" / "locustfile.py"
TIMEOUT_S = 120
WORKERS = 3  # with the client's retries, and as many without any
REQUESTS = 400  # of each worker, at least
KILLED_AFTER = 80  # answers of a worker; the one that comes back is killed after twice as many, gracefully


def nginx_configuration(folder: Path, listen: int, replicas: list[int]) -> Path:
    """compose's own template, filled in as nginx's image does, within the least that makes it a configuration."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    mounted, _ = services["proxy"]["volumes"]
    template = (ROOT / mounted.partition(":")[0]).read_text(encoding="utf-8")
    filled = {
        "LISTEN": f"127.0.0.1:{listen}",
        "REPLICA_A": f"127.0.0.1:{replicas[0]}",
        "REPLICA_B": f"127.0.0.1:{replicas[1]}",
    }
    assert set(filled) == set(services["proxy"]["environment"])
    for name, value in filled.items():
        template = template.replace(f"${{{name}}}", value)
    temporary = "\n".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    # As root, nginx's workers would be somebody who may not enter a test's folder.
    user = "user root;" if os.geteuid() == 0 else ""
    path.write_text(
        f"{user} daemon off; pid {folder}/nginx.pid; error_log stderr warn; worker_processes 2;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}\n{template}\n}}\n"
    )
    return path


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()  # killed outright, nginx would leave its workers behind
        process.wait(TIMEOUT_S)


def until(condition, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)  # between two looks


def offered_by_locust(url: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Steady load as the `load` profile's; it exits with 1 where a single request fails."""
    steady = ["--shape", "steady", "--rate", "3", "--minutes", "0.25", "--max-failed", "0"]
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url, "--headless", "--only-summary"]
    return running(*locust, *steady, "Batch")


class Replica:
    """A service that can be killed and restarted at the same address."""

    def __init__(self, bundle: Path, redis_url: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        flags = ["--redis-url", redis_url, "--threads", "1", "--decode-threads", "1", "--log-level", "warning"]
        self._command = [
            sys.executable, "-m", "wikiclip", "serve", "--bundle", str(bundle), "--port", str(self.port), *flags,
            "--deadline-ms", "60000",  # a busy machine is no failure
        ]  # fmt: skip
        self._client = httpx.Client(base_url=self.url, timeout=TIMEOUT_S)
        self.process = subprocess.Popen(self._command)

    def wait_until_ready(self) -> None:
        wait_until_ready(self.process, self.url)

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        self.process.wait(TIMEOUT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._client.close()

    def start_again(self) -> None:
        self.process = subprocess.Popen(self._command)
        self.wait_until_ready()

    def answered(self, route: str = "/recognize") -> float:
        lines = self._client.get("/metrics").text.splitlines()
        counted = [line for line in lines if line.startswith(f'wikiclip_requests_total{{route="{route}"')]
        return sum(float(line.rpartition(" ")[2]) for line in counted)


class Load:
    """Steady load until `over`: workers that ask one question after the other, each a different image, and count what
    fails. Each asks `REQUESTS` at least."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._photos = [photograph(seed, 160, 120) for seed in range(8)]
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self.over = threading.Event()
        self.asked = 0
        self.failed: list[str] = []  # by those who retry nothing
        self.failed_with_retries: list[str] = []

    def image(self, number: int) -> bytes:
        return self._photos[number % len(self._photos)] + number.to_bytes(8, "big")  # no cache has it

    def numbers(self) -> Iterator[int]:
        for asked in itertools.count():
            if asked >= REQUESTS and self.over.is_set():
                return
            yield next(self._numbers)

    def done(self, number: int, failure: str | None, failures: list[str]) -> None:
        with self._lock:
            self.asked += 1
            if failure is not None:
                failures.append(f"{number}: {failure}")

    def with_retries(self) -> None:
        with Client(self._url, timeout_s=TIMEOUT_S) as client:
            for number in self.numbers():
                failure = None
                try:
                    client.recognize(self.image(number), RecognizeOptions(top_k=1))
                except Exception as error:  # whatever it is, it is counted
                    failure = repr(error)
                self.done(number, failure, self.failed_with_retries)

    def without(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_S) as client:
            for number in self.numbers():
                failure = None
                try:
                    answer = client.post(
                        "/recognize", content=self.image(number), headers={"Content-Type": "image/jpeg"}
                    )
                    failure = None if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"
                except httpx.HTTPError as error:
                    failure = repr(error)
                self.done(number, failure, self.failed)


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_a_replica_may_be_killed_under_load(small_bundle, redis_server, tmp_path):
    _, redis_url = redis_server()
    listen = free_port()
    with ExitStack() as ended:
        replicas = [Replica(small_bundle, redis_url) for _ in range(2)]
        for replica in replicas:
            ended.callback(replica.close)
        for replica in replicas:
            replica.wait_until_ready()
        configuration = nginx_configuration(tmp_path, listen, [replica.port for replica in replicas])
        ended.enter_context(running(NGINX, "-c", str(configuration), "-p", str(tmp_path)))
        url = f"http://127.0.0.1:{listen}"
        until(lambda: reachable(f"{url}/readyz"), "nginx does not answer")

        load, pool = Load(url), ended.enter_context(ThreadPoolExecutor(2 * WORKERS))
        ended.callback(load.over.set)  # before the pool waits for the workers
        workers = [pool.submit(ask) for ask in (load.with_retries, load.without) for _ in range(WORKERS)]

        def after(answers: int) -> None:
            until(lambda: load.asked >= 2 * WORKERS * answers, f"{load.asked} answers only: {load.failed}")

        first, second = replicas
        after(KILLED_AFTER)
        assert first.answered() > 0
        first.end(signal.SIGKILL)
        first.start_again()
        until(lambda: first.answered() > 0, "the replica that came back is asked nothing")
        after(2 * KILLED_AFTER)
        assert not any(worker.done() for worker in workers)
        second.end(signal.SIGTERM)
        load.over.set()
        for worker in workers:
            worker.result(TIMEOUT_S)
        assert load.asked >= 2 * WORKERS * REQUESTS
        assert load.failed_with_retries == []
        assert len(load.failed) < 0.001 * WORKERS * REQUESTS, load.failed
        # Nobody but the replicas themselves tells their metrics, or takes another bundle.
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.post(f"{url}/admin/bundle").status_code == 404

        second.start_again()
        with offered_by_locust(url) as locust:
            until(lambda: first.answered("/recognize/batch") > 0, "Locust does not ask the replica to be killed")
            first.end(signal.SIGKILL)
            assert locust.wait(TIMEOUT_S) == 0, "a request failed"


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_the_proxy_limits_the_connections_of_a_client(tmp_path):
    listen = free_port()
    address = ("127.0.0.1", listen)
    get = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as ended:
        deaf = ended.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))  # accepts and never answers
        configuration = nginx_configuration(tmp_path, listen, [deaf.getsockname()[1]] * 2)
        ended.enter_context(running(NGINX, "-c", str(configuration), "-p", str(tmp_path)))
        until(lambda: listens(address), "nginx does not listen")
        connections = [ended.enter_context(socket.create_connection(address, TIMEOUT_S)) for _ in range(129)]
        for connection in connections:
            connection.sendall(get)
        refused, _, _ = select.select(connections, [], [], TIMEOUT_S)
        assert [connection.recv(12) for connection in refused] == [b"HTTP/1.1 429"]


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def reachable(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False
