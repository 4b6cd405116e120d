"""A web server with the failures that a downloader must handle."""

from __future__ import annotations

import io
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from PIL import Image

from benchmarks.extreme import tiff_fax

STRANGE = (  # headers that once ended the run
    ("Retry-After", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
    ("Retry-After", "Mon, 01 Jan 2020 00:00:00 +99999999999999"),
    ("Retry-After", "9" * 5000),
    ("Location", "http://127.0.0.1:99999/"),
    ("Location", "http://127.0.0.1:-1/"),
    ("Location", "http://xn--/"),
)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """The first part of the path selects the behaviour. Requests are counted and timed by path."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.times.append((self.path, time.monotonic()))
            self.server.agents.add(self.headers["User-Agent"])
            self.server.requests[self.path] += 1
            self.server.active += 1
            self.server.most_active = max(self.server.most_active, self.server.active)
        try:
            kind = self.path.split("/")[1]
            getattr(self, f"answer_{kind}")(self.server.requests[self.path])
        finally:
            with self.server.lock:
                self.server.active -= 1

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def image(self) -> bytes:
        return jpeg(sum(self.path.encode()))

    def answer_good(self, _: int) -> None:
        self.send(200, self.image())

    def answer_slow(self, _: int) -> None:
        time.sleep(0.05)
        self.send(200, self.image())

    def answer_busy(self, attempt: int) -> None:
        if attempt == 1:
            self.send(429, b"later", {"Retry-After": "1"})
        else:
            self.send(200, self.image())

    def answer_closed(self, _: int) -> None:
        self.send(503, b"", {"Retry-After": "86400"})

    def answer_flaky(self, attempt: int) -> None:
        if attempt <= 2:
            self.send(503, b"down")
        else:
            self.send(200, self.image())

    def answer_down(self, _: int) -> None:
        self.send(500, b"down")

    def answer_gone(self, _: int) -> None:
        self.send(404, b"gone")

    def answer_drip(self, _: int) -> None:
        self.send(200, b"", length=10_000)
        while not self.server.stopping.wait(0.02):
            self.wfile.write(b".")

    def answer_cut(self, attempt: int) -> None:
        data = self.image()
        self.send(200, data if attempt == 2 else data[: len(data) // 2], length=len(data))
        self.close_connection = True

    def answer_reset(self, attempt: int) -> None:
        if attempt == 2:
            self.send(200, self.image())
            return
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RD)
        self.close_connection = True

    def answer_loop(self, _: int) -> None:
        self.send(302, b"", {"Location": self.path})

    def answer_moved(self, _: int) -> None:
        self.send(301, b"", {"Location": "/good/moved"})

    def answer_strange(self, _: int) -> None:
        name, value = STRANGE[int(self.path.rsplit("/", 1)[1])]
        self.send(503 if name == "Retry-After" else 302, b"", {name: value})

    def answer_away(self, _: int) -> None:
        self.send(302, b"", {"Location": "file:///etc/passwd"})

    def answer_text(self, _: int) -> None:
        self.send(200, b"<html></html>", {"Content-Type": "image/jpeg"})

    def answer_fax(self, _: int) -> None:
        self.send(200, tiff_fax(10**6))

    def answer_half(self, _: int) -> None:
        self.send(200, self.image()[:200])

    def answer_w(self, _: int) -> None:
        """Answer as MediaWiki's API does about `server.files`, one per request, the others in continuations."""
        query = dict(parse_qsl(urlsplit(self.path).query))
        titles = query["titles"].split("|")
        if "maxlag" not in query or not self.server.requests.total() % 3:
            return self.send(200, b'{"error": {"code": "maxlag"}}')
        if any(title in self.server.broken_files for title in titles):
            return self.send(404, b"gone")
        names = {title: title.replace("File:g", "File:G") for title in titles}
        moved = {name: self.server.moved_files.get(name, name) for name in names.values()}
        known = [name for name in moved.values() if name in self.server.files]
        place = int(query.get("iistart", "0"))
        pages: list[dict[str, Any]] = [{"title": name, "missing": True} for name in moved.values() if name not in known]
        for number, name in enumerate(known):
            pages.append({"title": name, **({"imageinfo": [self.server.files[name]]} if number == place else {})})
        answer: dict[str, Any] = {
            "query": {
                "normalized": [{"from": a, "to": b, "fromencoded": False} for a, b in names.items() if a != b],
                "redirects": [{"from": a, "to": b} for a, b in moved.items() if a != b],
                "pages": pages,
            }
        }
        if place + 1 < len(known):
            answer["continue"] = {"iistart": str(place + 1), "continue": "||"}
        return self.send(200, json.dumps(answer).encode())

    def answer_wiki(self, _: int) -> None:
        self.send(302, b"", {"Location": "/good/redirected"})

    def answer_huge(self, _: int) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        while not self.server.stopping.is_set():
            self.wfile.write(bytes(65536))

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.stopping = threading.Event()
        self.times: list[tuple[str, float]] = []
        self.agents: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.active = self.most_active = 0
        self.files: dict[str, dict[str, Any]] = {}  # by title: what the API says of them
        self.moved_files: dict[str, str] = {}
        self.broken_files: set[str] = set()

    def handle_error(self, *_: Any) -> None:
        pass  # some tests make the client disconnect

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.stopping.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def catalog_of(tmp_path: Path, server: Server) -> Callable[[Sequence[str]], Path]:
    """Return a function that writes a catalog of entities Q0, Q1 ... with one image each, at the given server paths."""

    def write(paths: Sequence[str]) -> Path:
        path = tmp_path / "catalog.jsonl"
        rows = [
            {"entity_id": f"Q{number}", "title": f"Thing {number}", "images": [server.url(name)]}
            for number, name in enumerate(paths)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
