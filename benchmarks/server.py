"""A service of its own for a benchmark: started as a user would, ready before the first request, stopped afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from core.errors import UserError

START_TIMEOUT_S = 60
ANSWERED = 'wikiclip_images_total{outcome="answered"}'  # in what it tells Prometheus


@contextmanager
def running_service(
    bundle: Path, *flags: str, cores: set[int] | None = None, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[str]:
    """Run `wikiclip serve` on a free port of this machine and yield its base URL once `/readyz` says 200.

    `cores` are the only ones it may use, where they are given. Raises `UserError` if it ends or is not ready within
    `start_timeout_s`.
    """
    with service_process(bundle, *flags, cores=cores, start_timeout_s=start_timeout_s) as (_, url):
        yield url


@contextmanager
def service_process(
    bundle: Path,
    *flags: str,
    cores: set[int] | None = None,
    module: str = "wikiclip",
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """As `running_service`, with the process, of `python -m wikiclip` or of another module that takes its arguments."""
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--bundle", str(bundle), "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        wait_until_ready(process, url := f"http://127.0.0.1:{port}", start_timeout_s)
        yield process, url
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT_S)


def split_cores() -> tuple[set[int], set[int]]:
    """Cores for the load generator and for the service: the last one, and the rest, where there is more than one."""
    cores = sorted(os.sched_getaffinity(0))
    return ({cores[-1]}, set(cores[:-1])) if len(cores) > 1 else (set(cores), set(cores))


def scrape_metrics(url: str) -> dict[str, float]:
    """What the service at this base URL tells Prometheus, by name and labels as they stand there."""
    lines = httpx.get(f"{url}/metrics", timeout=START_TIMEOUT_S).raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def thread_flags(cores: int) -> tuple[str, ...]:
    """The threads that a service on so many cores has by itself, said because it sees all cores of the machine."""
    return ("--threads", str(cores), "--decode-threads", str(2 * cores))


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once `/readyz` says 200. Raises `UserError` if the process ends or `timeout_s` pass before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError(
                f"the service ended with exit code {process.returncode} before it was ready; see its message above"
            )
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.05)  # between two looks at a port that does not listen yet
    raise UserError(f"the service was not ready within {timeout_s:g} s")
