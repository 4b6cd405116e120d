"""Start a service as a user would, POST images to it from a separate process, and record every response.

A closed loop sends the next request of a connection when the response is there. An open loop sends requests at random
times (Poisson), however long responses take. Users' own load tests are written with Locust (`locustfile.py`); Locust
cannot offer ten times the capacity of a service from one core, and costs more than the latencies compared here.
"""

import asyncio
import itertools
import math
import multiprocessing
import os
import random
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np

from core.errors import UserError

START_TIMEOUT_S = 240  # a large catalog is copied to a GPU first
ANSWERED = 'wikiclip_images_total{outcome="answered"}'  # a metric
TIMEOUT_S = 60.0
_MAX_DELAY_S = 0.2  # of an arrival in an open loop
_FAILURES = (OSError, EOFError, TimeoutError, ValueError, LookupError)  # of a request

Result = TypeVar("Result")


# ---- the service ----


@contextmanager
def service_process(
    bundle: Path,
    *flags: str,
    cores: set[int] | None = None,
    module: str = "wikiclip",
    prefix: Sequence[str] = (),
    stderr: IO[bytes] | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `wikiclip serve` on a free port and yield process and base URL once it is ready. Raise `UserError` if not.

    With `cores`, the service runs on these cores, with the default number of threads for so many. `module` takes the
    arguments of `python -m wikiclip`. `prefix` is a command that runs the command after it.
    """
    port = free_port()
    command = [*prefix, sys.executable, "-m", module, "serve", "--bundle", str(bundle), "--port", str(port)]
    if cores is not None:  # by default the service counts all cores of the machine
        command += ["--threads", str(len(cores)), "--decode-threads", str(2 * len(cores))]
    process = subprocess.Popen([*command, "--log-level", "error", *flags], stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        wait_until_ready(process, url := f"http://127.0.0.1:{port}")
        yield process, url
    finally:
        process.terminate()
        process.wait(timeout=START_TIMEOUT_S)


def split_cores(generator_cores: int = 1) -> tuple[set[int], set[int]]:
    """Return the cores of the load generator, at most half of them, and of the service. A single core is both."""
    cores = sorted(os.sched_getaffinity(0))
    taken = min(generator_cores, len(cores) // 2)
    return (set(cores[-taken:]), set(cores[:-taken])) if taken else (set(cores), set(cores))


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


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Return once `/readyz` answers 200. Raise `UserError` if the process ends or the time runs out."""
    # One client for all polls: a new one loads certificates, and the service that is starting needs the processor.
    with httpx.Client(timeout=2) as client:

        def is_ready() -> bool:
            if process.poll() is not None:
                code = process.returncode
                raise UserError(f"the service ended with exit code {code} before it was ready; see its message above")
            try:
                return client.get(f"{url}/readyz").status_code == httpx.codes.OK
            except httpx.TransportError:
                return False

        wait_for(is_ready, "the service was not ready")


def wait_for(condition: Callable[[], bool], failure: str) -> None:
    """Poll until a condition holds. Raise `UserError` after `START_TIMEOUT_S`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise UserError(f"{failure} within {START_TIMEOUT_S} s")
        time.sleep(0.05)


# ---- the load ----


class Response(NamedTuple):
    """The outcome of one request. `at_s` counts from the start of the run; `error` is empty if there was a response."""

    at_s: float
    took_ms: float
    status: int
    retry_after: bool
    error: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """POST the files in `images` to `url` in turn, with bytes appended that no cache has seen.

    With `phases`, pairs of requests per second and seconds, the loop is open. Otherwise it is closed, with as many
    `connections` for `seconds`. `form_field` is the form field of the image; without it the image is the body.
    With `poll` the generator never sleeps, which makes sense for one connection.
    """

    url: str
    images: Sequence[str]
    cores: Sequence[int]
    form_field: str | None = None
    connections: int = 1
    seconds: float = 0.0
    phases: Sequence[tuple[float, float]] = ()
    poll: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """The responses of a job in the order they were sent, and the share of one core that the generator used."""

    responses: list[Response]
    busy: float


def generate(jobs: Sequence[Job], during: Callable[[], object] = lambda: None) -> list[Run]:
    """Run jobs at the same time, each in a process of its own. Call `during` when all have started."""
    return run_on_cores([(partial(run_job, job), job.cores) for job in jobs], during)


def run_on_cores(
    calls: Sequence[tuple[Callable[[], Result], Iterable[int]]], during: Callable[[], object] = lambda: None
) -> list[Result]:
    """Call functions at the same time, each in a new process on its cores. Call `during` when all have started."""
    with ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawn, os.sched_setaffinity, (0, list(cores))))
            for _, cores in calls
        ]
        for started in [pool.submit(os.getpid) for pool in pools]:
            started.result()
        running = [pool.submit(call) for pool, (call, _) in zip(pools, calls, strict=True)]
        during()
        return [each.result() for each in running]


def closed_loop(job: Job, *, warm_up_s: float) -> dict[str, Any]:
    """Run a closed loop and return its figures. Requests that end in the first `warm_up_s` seconds do not count."""
    (run,) = generate([job])
    figures = summarise(run.responses, warm_up_s=warm_up_s, seconds=job.seconds - warm_up_s)
    return {**figures, "generator_busy": run.busy}


def summarise(responses: Iterable[Response], *, warm_up_s: float = 0.0, seconds: float = math.inf) -> dict[str, Any]:
    """Return responses per second, latency percentiles and failures of the `seconds` after the warm-up."""
    counted = [each for each in responses if warm_up_s <= each.at_s + each.took_ms / 1000 < warm_up_s + seconds]
    took_ms = [each.took_ms for each in counted if each.status == HTTPStatus.OK]
    p50, p99 = np.percentile(took_ms, (50, 99)).round(2).tolist() if took_ms else (None, None)
    return {
        "per_s": round(len(took_ms) / seconds, 2),
        "p50_ms": p50,
        "p99_ms": p99,
        "answers": len(took_ms),
        "failures": dict(Counter(each.error or str(each.status) for each in counted if each.status != HTTPStatus.OK)),
    }


def encode_image(image: bytes, form_field: str | None) -> tuple[bytes, str]:
    """Return a request's body and content type."""
    if form_field is None:
        return image, "image/jpeg"
    form = httpx.Request("POST", "http://server", files={form_field: ("i.jpg", image, "image/jpeg")})
    return form.read(), form.headers["Content-Type"]


class _Connection:
    """An HTTP/1.1 connection for one request at a time, to servers that send `Content-Length`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @property
    def closed(self) -> bool:
        return self._writer.is_closing() or self._reader.at_eof()

    def close(self) -> None:
        self._writer.close()

    async def post(self, request: bytes) -> tuple[int, bool]:
        """Return the status, and whether there is a `Retry-After`. Raise one of `_FAILURES` without a response."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status, *lines = head.lower().split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines if line)
        await self._reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection") == b"close":
            self.close()
        return int(status.split()[1]), b"retry-after" in headers


class _Generator:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._url = urlsplit(job.url)
        self._images = [Path(path).read_bytes() for path in job.images]
        self._idle: list[_Connection] = []
        self.responses: list[Response] = []

    async def run(self) -> None:
        self._started = time.perf_counter()
        requests = self._requests()
        if self._job.phases:
            await self._open_loop(requests)
        else:
            await asyncio.gather(*(self._closed_loop(requests) for _ in range(self._job.connections)))
        for connection in self._idle:
            connection.close()
        self.responses.sort()

    async def _closed_loop(self, requests: Iterator[bytes]) -> None:
        while time.perf_counter() < self._started + self._job.seconds:
            await self._send(next(requests))

    async def _open_loop(self, requests: Iterator[bytes]) -> None:
        due = ends = self._started
        async with asyncio.TaskGroup() as tasks:
            for rate, seconds in self._job.phases:
                ends += seconds
                while (due := due + random.expovariate(rate)) < ends:
                    if due < time.perf_counter() - _MAX_DELAY_S:
                        continue  # the core is saturated: drop arrivals, so that phases keep their length
                    await asyncio.sleep(due - time.perf_counter())
                    tasks.create_task(self._send(next(requests)))
                due = ends

    def _requests(self) -> Iterator[bytes]:
        """Yield requests for the images in turn. A decoder ignores the number after the end of the image."""
        target = self._url.path + (f"?{self._url.query}" if self._url.query else "")
        for number in itertools.count(random.SystemRandom().getrandbits(40)):
            image = self._images[number % len(self._images)] + number.to_bytes(8, "big")
            body, content_type = encode_image(image, self._job.form_field)
            yield (
                f"POST {target} HTTP/1.1\r\nHost: {self._url.netloc}\r\nContent-Type: {content_type}\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            ).encode() + body

    async def _send(self, request: bytes) -> None:
        """Send a request on an idle connection or a new one, and record its response."""
        started = time.perf_counter()
        connection: _Connection | None = None
        status, retry_after, problem = 0, False, ""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._connect()
                status, retry_after = await connection.post(request)
        except _FAILURES as error:
            problem = type(error).__name__
            if connection is not None:
                connection.close()
        else:
            self._idle.append(connection)
        ended = time.perf_counter()
        self.responses.append(Response(started - self._started, 1000 * (ended - started), status, retry_after, problem))

    async def _connect(self) -> _Connection:
        """Return an idle connection or a new one."""
        while self._idle:
            if not (connection := self._idle.pop()).closed:
                return connection
        return _Connection(*await asyncio.open_connection(self._url.hostname, self._url.port or 80))


class _PollingSelector(selectors.DefaultSelector):
    """Never sleeps. A virtual core takes about 0.1 ms to wake up, which would count as the service's time."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(0)


def run_job(job: Job) -> Run:
    """Run a job in this process."""
    generator = _Generator(job)
    selector = _PollingSelector() if job.poll else selectors.DefaultSelector()
    started, cpu_started = time.perf_counter(), time.process_time()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(generator.run())
    busy = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    return Run(responses=generator.responses, busy=round(busy, 2))
