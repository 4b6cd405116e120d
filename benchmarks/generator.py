"""Start a service as a user would, POST images to it from a separate process, and record every response.

A closed loop sends the next request of a connection when the response is there. An open loop sends requests at random
times (Poisson), however long responses take. Users' own load tests are written with Locust (`locustfile.py`); Locust
cannot offer ten times the capacity of a service from one core, and costs more than the latencies compared here.

`python -m benchmarks.generator` is the process of one `Job`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httptools
import httpx
import numpy as np

from core.errors import UserError

START_TIMEOUT_S = 240  # a large catalog is copied to a GPU first
ANSWERED = 'wikiclip_images_total{outcome="answered"}'  # a metric
TIMEOUT_S = 60.0
_MAX_DELAY_S = 0.2  # of an arrival in an open loop
_BOUNDARY = "wikiclip-benchmark-boundary"


# ---- the service ----


@contextmanager
def running_service(bundle: Path, *flags: str, cores: set[int] | None = None) -> Iterator[str]:
    """Run `wikiclip serve` on a free port and yield its base URL once it is ready. Raise `UserError` if it is not.

    With `cores`, the service runs on these cores, with the default number of threads for so many.
    """
    with service_process(bundle, *flags, cores=cores) as (_, url):
        yield url


@contextmanager
def service_process(
    bundle: Path, *flags: str, cores: set[int] | None = None, module: str = "wikiclip"
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Like `running_service`, but also yield the process. `module` takes the arguments of `python -m wikiclip`."""
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--bundle", str(bundle), "--port", str(port)]
    if cores is not None:  # by default the service counts all cores of the machine
        command += ["--threads", str(len(cores)), "--decode-threads", str(2 * len(cores))]
    process = subprocess.Popen([*command, "--log-level", "error", *flags], stdout=subprocess.DEVNULL)
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

    def is_ready() -> bool:
        if process.poll() is not None:
            code = process.returncode
            raise UserError(f"the service ended with exit code {code} before it was ready; see its message above")
        try:
            return httpx.get(f"{url}/readyz", timeout=2).status_code == httpx.codes.OK
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

    @property
    def ended_s(self) -> float:
        return self.at_s + self.took_ms / 1000


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
    runs = run_workers("benchmarks.generator", [asdict(job) for job in jobs], during)
    return [Run(responses=[Response(*each) for each in run["responses"]], busy=run["busy"]) for run in runs]


def run_workers(module: str, jobs: Sequence[Any], during: Callable[[], object] = lambda: None) -> list[Any]:
    """Run a module in one process for each job, and return what they write.

    The main function of the module calls `read_job`, prepares itself, calls `wait_for_start` and writes JSON. All
    processes start at the same time. Raise `RuntimeError` if one fails.
    """
    with ExitStack() as stack:
        processes = []
        for job in jobs:
            command, root = [sys.executable, "-m", module], Path(__file__).parents[1]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
            processes.append(stack.enter_context(process))
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        outputs = [process.stdout for process in processes if process.stdout is not None]
        for output in outputs:
            output.readline()  # "ready"
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        during()
        results = [output.read() for output in outputs]
    if failed := [process.returncode for process in processes if process.returncode]:
        raise RuntimeError(f"{module} ended with exit code {failed[0]}; see its message above")
    return [json.loads(result) for result in results]


def read_job() -> Any:
    """Return the job of this process."""
    return json.loads(sys.stdin.readline())


def wait_for_start() -> None:
    """Return when all processes are ready."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


def closed_loop(job: Job, *, warm_up_s: float) -> dict[str, Any]:
    """Run a closed loop and return its figures. Requests that end in the first `warm_up_s` seconds do not count."""
    (run,) = generate([job])
    figures = summarise(run.responses, warm_up_s=warm_up_s, seconds=job.seconds - warm_up_s)
    return {**figures, "generator_busy": run.busy}


def summarise(responses: Iterable[Response], *, warm_up_s: float = 0.0, seconds: float = math.inf) -> dict[str, Any]:
    """Return responses per second, latency percentiles and failures of the `seconds` after the warm-up."""
    counted = [each for each in responses if warm_up_s <= each.ended_s < warm_up_s + seconds]
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
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{form_field}"; filename="i.jpg"\r\n'
    body = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection for one request at a time."""

    _done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def post(self, request: bytes) -> None:
        """Send a request and wait for its response. Raise `OSError` if there is none."""
        if self.transport.is_closing():
            raise ConnectionResetError("closed before the request was sent")
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self.retry_after = False
        self.transport.write(request)
        await self._done

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.connection_lost(ConnectionError(f"not an HTTP response: {error}"))

    def on_header(self, name: bytes, _: bytes) -> None:
        self.retry_after |= name.lower() == b"retry-after"

    def on_message_complete(self) -> None:
        self.ended = time.perf_counter()
        self.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.transport.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionResetError("closed before the response was complete"))


class _Generator:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._url = urlsplit(job.url)
        self._images = [Path(path).read_bytes() for path in job.images]
        self._idle: list[Connection] = []
        self.responses: list[Response] = []

    async def run(self) -> None:
        self._started = time.perf_counter()
        requests = self._requests()
        if self._job.phases:
            await self._open_loop(requests)
        else:
            await asyncio.gather(*(self._closed_loop(requests) for _ in range(self._job.connections)))
        for connection in self._idle:
            connection.transport.close()
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
        connection: Connection | None = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._connect()
                await connection.post(request)
        except (OSError, TimeoutError) as error:
            took_ms = 1000 * (time.perf_counter() - started)
            response = Response(started - self._started, took_ms, 0, False, type(error).__name__)
            if connection is not None:
                connection.transport.abort()
        else:
            took_ms = 1000 * (connection.ended - started)
            response = Response(started - self._started, took_ms, connection.status, connection.retry_after, "")
            self._idle.append(connection)
        self.responses.append(response)

    async def _connect(self) -> Connection:
        """Return an idle connection or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.transport.is_closing():
                return connection
        host, port = str(self._url.hostname), self._url.port or 80
        _, connection = await asyncio.get_running_loop().create_connection(Connection, host, port)
        return connection


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


def main() -> None:
    """Run a job on its cores, and write the run."""
    job = Job(**read_job())
    os.sched_setaffinity(0, job.cores)
    wait_for_start()
    json.dump(asdict(run_job(job)), sys.stdout)


if __name__ == "__main__":
    main()
