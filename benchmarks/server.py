"""Start a service for a benchmark, as a user would, and read its metrics."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from core.errors import UserError

START_TIMEOUT_S = 60
ANSWERED = 'wikiclip_images_total{outcome="answered"}'  # a metric


@contextmanager
def running_service(
    bundle: Path, *flags: str, cores: set[int] | None = None, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[str]:
    """Run `wikiclip serve` on a free port and yield its base URL once it is ready.

    `cores` limits the cores that the service may use. Raise `UserError` if it is not ready within `start_timeout_s`.
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
    """Like `running_service`, but also yield the process. `module` takes the arguments of `python -m wikiclip`."""
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


def split_cores(generator_cores: int = 1) -> tuple[set[int], set[int]]:
    """Return the cores of the load generator, at most half of them, and of the service. A single core is both."""
    cores = sorted(os.sched_getaffinity(0))
    taken = min(generator_cores, len(cores) // 2)
    return (set(cores[-taken:]), set(cores[:-taken])) if taken else (set(cores), set(cores))


def thread_flags(cores: int) -> tuple[str, ...]:
    """Return flags for the default number of threads on so many cores. The service counts all cores of the machine."""
    return ("--threads", str(cores), "--decode-threads", str(2 * cores))


def scrape_metrics(url: str) -> dict[str, float]:
    """Return the Prometheus metrics of the service at this base URL, by name and labels."""
    lines = httpx.get(f"{url}/metrics", timeout=START_TIMEOUT_S).raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def free_port() -> int:
    """Return a port that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once `/readyz` answers 200. Raise `UserError` if the process ends or the time runs out."""

    def is_ready() -> bool:
        if process.poll() is not None:
            raise UserError(
                f"the service ended with exit code {process.returncode} before it was ready; see its message above"
            )
        try:
            return httpx.get(f"{url}/readyz", timeout=2).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    wait_for(is_ready, "the service was not ready", timeout_s)


def wait_for(condition: Callable[[], bool], failure: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Poll until a condition holds. Raise `UserError` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"{failure} within {timeout_s:g} s")
        time.sleep(0.05)
