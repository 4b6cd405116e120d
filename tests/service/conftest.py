"""A real service on a free port, and what to ask it with."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
import uvicorn

from index.bundle import Bundle
from index.transfer import local_bundle
from service.app import create_app
from service.recognizer import Recognizer
from service.server import bind, server_config
from service.settings import Settings


@contextmanager
def served(bundle: Path | str, *, encoder=None, fetcher=None, tracing=None, **settings) -> Iterator[httpx.Client]:
    """Serve a bundle under uvicorn in a thread; yields a client of it."""
    configured = Settings(bundle=bundle, threads=1, decode_threads=2, **settings)
    recognizer = Recognizer(Bundle.open(local_bundle(bundle, configured.bundle_cache)), configured, encoder)
    with bind("127.0.0.1", 0) as listener:
        listener.listen()  # so that a client can connect before the server has started
        app = create_app(configured, recognizer, fetcher, tracing)
        server = uvicorn.Server(server_config(configured, app))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=30, verify=False) as client:  # loads no certificates, which is slow
                assert client.get("/readyz").status_code == 200
                yield client
        finally:
            server.should_exit = True
            thread.join()


class GatedEncoder:
    """Embeds every image alike, and only while its gate is open; it is shut at first."""

    device = "cpu"
    heat_maps = True

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.sizes: list[int] = []

    def encode(self, pixels_BHW3):
        self.sizes.append(len(pixels_BHW3))
        self.entered.release()
        assert self.gate.wait(120), "generous: a busy machine is no failure"
        return np.ones((len(pixels_BHW3), 16), np.float32)

    def patch_tokens(self, pixels_BHW3):
        return np.ones((len(pixels_BHW3), 4, 16), np.float32)


@pytest.fixture
def gated_encoder():
    encoder = GatedEncoder()
    yield encoder
    encoder.gate.set()


@pytest.fixture(scope="session")
def serve():
    """`served`, for a test that wants a service of its own."""
    return served


@pytest.fixture(scope="package")
def service(small_bundle) -> Iterator[httpx.Client]:
    with served(small_bundle) as client:
        yield client


@pytest.fixture(scope="package")
def giraffe(small_images) -> bytes:
    return small_images["Q15083"]


@pytest.fixture
def redis_server(tmp_path):
    """A starter of real Redis servers on one port."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[subprocess.Popen[bytes], str]:
        command = ["redis-server", "--port", str(port), "--save", "", "--dir", str(tmp_path), "--bind", "127.0.0.1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        started.append(process)
        with redis.Redis(port=port) as client:
            for _ in range(200):
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.02)  # another process is starting: asking again is all there is
        return process, f"redis://127.0.0.1:{port}/0"

    yield start
    for process in started:
        process.kill()
        process.wait()
