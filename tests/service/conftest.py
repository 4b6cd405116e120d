"""A real service on a free port, and what to ask it with."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from index.bundle import Bundle
from service.app import create_app
from service.recognizer import Recognizer
from service.settings import Settings


@contextmanager
def served(bundle: Path, *, encoder=None, **settings) -> Iterator[httpx.Client]:
    """Serve a bundle under uvicorn in a thread; yields a client of it."""
    configured = Settings(bundle=bundle, threads=1, decode_threads=2, **settings)
    recognizer = Recognizer(Bundle.open(bundle), configured, encoder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(configured, recognizer)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", access_log=False))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
                assert client.get("/readyz").status_code == 200
                yield client
        finally:
            server.should_exit = True
            thread.join()


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
