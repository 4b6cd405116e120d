"""Signals: SIGTERM ends the process in time, whatever hangs. SIGHUP during start is remembered. Idle connections."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from benchmarks import extreme
from service.app import create_app
from service.server import server_config
from service.settings import Settings

TIMEOUT_S = 120  # generous: a busy machine is no failure
DEADLINE_MS = 300
CLOSE_S = 2
LIMIT_S = DEADLINE_MS // 1000 + 1 + CLOSE_S

# `wikiclip serve` whose decoding, encoding or loading of a second bundle never ends, or that waits before its start.
SERVE = f"""
import sys, threading, imaging.decoder, service.engine, service.recognizer, service.server
hanging = sys.argv[1]
service.server._CLOSE_S = {CLOSE_S}
def hang(*arguments, **options):
    print("hangs", flush=True)
    threading.Event().wait()
if hanging == "decode":
    imaging.decoder.load_region = hang
if hanging == "encode":
    service.engine.Engine._encode = hang
if hanging == "swap":
    service.recognizer.Recognizer._load = hang
if hanging == "start":
    load = service.recognizer.Recognizer.open
    def open_slowly(*arguments):
        recognizer = load(*arguments)
        print("loaded", flush=True)
        sys.stdin.readline()
        return recognizer
    service.server.Recognizer.open = open_slowly
sys.argv = ["wikiclip", "serve", *sys.argv[2:]]
import wikiclip.cli
wikiclip.cli.main()
"""


def start(hanging: str, bundle: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVE, hanging, "--bundle", str(bundle), "--port", "0", "--threads", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *flags], **pipes)


def address(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stderr is not None
    url = next(line for line in process.stderr if "serving" in line).partition("on ")[2].partition('"')[0]
    with httpx.Client(base_url=url, transport=httpx.HTTPTransport(retries=50), timeout=TIMEOUT_S) as client:
        assert client.get("/livez").status_code == 200  # it logs its address before it listens
    return client.base_url.host, client.base_url.port or 0


@pytest.fixture
def deaf_server():
    """A port that accepts connections and never answers: a Redis or a collector that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("hanging", ["decode", "encode", "swap", "client, Redis and collector"])
def test_sigterm_ends_the_process_in_time(hanging, small_bundle, small_images, deaf_server):
    flags = ["--deadline-ms", str(DEADLINE_MS), "--admin-token", "secret"]
    if "Redis" in hanging:
        flags += [
            "--redis-url",
            f"redis://127.0.0.1:{deaf_server}/0",
            "--otlp-endpoint",
            f"http://127.0.0.1:{deaf_server}",
        ]
    with start(hanging, small_bundle, *flags) as process:
        try:
            host, port = address(process)
            with socket.create_connection((host, port), TIMEOUT_S) as client:
                if hanging == "swap":
                    body, head = json.dumps({"path": str(small_bundle)}).encode(), b"POST /admin/bundle HTTP/1.1\r\n"
                else:
                    body, head = small_images["Q140"], extreme.POST % b"image/png"
                head += b"Host: a\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n" % len(body)
                client.sendall(head + body)
                if "client" in hanging:
                    client.settimeout(1)
                    with pytest.raises(TimeoutError):  # it reads nothing, so the service reads no more
                        client.sendall(extreme.GET * 1_000_000)
                else:
                    assert process.stdout is not None
                    assert process.stdout.readline() == "hangs\n"
                began_at = time.monotonic()
                process.send_signal(signal.SIGTERM)
                _, log = process.communicate(timeout=TIMEOUT_S)
            elapsed_s = time.monotonic() - began_at
        finally:
            process.kill()
    assert elapsed_s < LIMIT_S + 2
    if hanging == "decode":
        assert process.returncode == 1
        assert f"the shutdown did not end within {LIMIT_S} s" in log
        assert "decode_0" in log
    elif hanging in ("encode", "swap"):
        assert process.returncode == -signal.SIGTERM


def test_sighup_during_start_reloads_the_bundle(small_bundle, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(small_bundle, tmp_path / name)
    link = tmp_path / "current"
    link.symlink_to("a")
    with start("start", link) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.readline() == "loaded\n"
            link.unlink()
            link.symlink_to("b")
            process.send_signal(signal.SIGHUP)
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert any("SIGHUP during start" in line for line in process.stderr)
            assert any("answers instead of" in line for line in process.stderr)
        finally:
            process.terminate()


def test_sighup_before_the_bundle_is_read_does_not_end_the_process(small_bundle):
    with start("nothing", small_bundle) as process:
        try:
            stop = threading.Event()

            def send_sighups() -> None:
                while not stop.wait(0.01):
                    os.kill(process.pid, signal.SIGHUP)

            status = Path(f"/proc/{process.pid}/status")
            while not any(int(mask, 16) & 1 for mask in re.findall(r"Sig(?:Ign|Cgt):\s+(\w+)", status.read_text())):
                time.sleep(0.001)  # another process: polling is the only way to see its state
                assert process.poll() is None
            sending = threading.Thread(target=send_sighups)
            sending.start()
            address(process)
            stop.set()
            sending.join()
        finally:
            process.terminate()


def test_idle_connections_stay_open_longer_than_load_balancers_use_them():
    """ingress-nginx and others reuse a connection for 60 s. A request on one that the service closes then is lost."""
    settings = Settings(bundle=Path("bundle"))
    assert server_config(settings, create_app(settings)).timeout_keep_alive > 60
