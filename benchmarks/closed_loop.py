"""A closed loop of requests from a process of its own: some connections, each asking again as soon as it is answered.

`python -m benchmarks.closed_loop JOB.json` prints figures as JSON. It imports no more than it needs, so that the one
core it has goes into asking.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.plain_http import Connection, request_bytes

BOUNDARY = "wikiclip-benchmark-boundary"
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """POST the files in `images` to `url` in turn over `connections`, uncounted for `warm_up_s`, then for `seconds`.

    `field` is the part of a form that the image is sent as; None sends the image itself as the body. With `tells_each`
    the figures have the time of every answer, as `taken_ms`. With `polls` the generator does not sleep while it waits,
    which is of use with one connection.
    """

    url: str
    images: list[str]
    field: str | None
    connections: int
    warm_up_s: float
    seconds: float
    tells_each: bool = False
    polls: bool = False


def run_job(job: Job, work: Path, cores: set[int]) -> dict[str, Any]:
    """Run a job in a process on these cores; answers a second, latency percentiles in ms, and what failed."""
    return run_jobs([job], work, [cores])[0]


def run_jobs(jobs: Sequence[Job], work: Path, cores: Sequence[set[int]]) -> list[dict[str, Any]]:
    """Run jobs side by side, each in a process on the cores of its own; the figures of each."""
    with ExitStack() as stack:
        processes = []
        for number, (job, own) in enumerate(zip(jobs, cores, strict=True)):
            path = work / f"job{number}.json"
            path.write_text(json.dumps(asdict(job)), encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.closed_loop", str(path)],
                stdout=subprocess.PIPE,
                cwd=Path(__file__).parents[1],
            )
            processes.append(stack.enter_context(process))
            os.sched_setaffinity(process.pid, own)
        said = [process.communicate()[0] for process in processes]
    if failed := [process.returncode for process in processes if process.returncode]:
        raise RuntimeError(f"the load generator ended with exit code {failed[0]}; see its message above")
    return [json.loads(each) for each in said]


def body_of(image: bytes, field: str | None) -> tuple[bytes, str]:
    """The body and its content type."""
    if field is None:
        return image, "image/jpeg"
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="i.jpg"\r\n'
    whole = head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    return whole, f"multipart/form-data; boundary={BOUNDARY}"


class _Loop:
    def __init__(self, job: Job) -> None:
        url = urlsplit(job.url)
        assert url.hostname is not None
        assert url.port is not None
        self._address = url.hostname, url.port
        self._polls = job.polls
        target = url.path + (f"?{url.query}" if url.query else "")
        bodies = [body_of(Path(path).read_bytes(), job.field) for path in job.images]
        self._requests = [request_bytes(target, content_type, body) for body, content_type in bodies]
        self._lock = threading.Lock()
        self._next = 0
        self._counts_from = time.perf_counter() + job.warm_up_s
        self._ends = self._counts_from + job.seconds
        self.taken_ms: list[float] = []
        self.failures: dict[str, int] = {}

    def ask_until_over(self) -> None:
        connection = Connection(*self._address, TIMEOUT_S, polls=self._polls)
        while time.perf_counter() < self._ends:
            with self._lock:
                request = self._requests[self._next % len(self._requests)]
                self._next += 1
            started = time.perf_counter()
            failure: str | None = None
            try:
                status = connection.ask(request)
                if status != HTTPStatus.OK:
                    failure = str(status)
            except (OSError, ValueError) as error:
                failure = type(error).__name__
            ended = time.perf_counter()
            if self._counts_from <= ended < self._ends:
                with self._lock:
                    if failure is None:
                        self.taken_ms.append(1000 * (ended - started))
                    else:
                        self.failures[failure] = self.failures.get(failure, 0) + 1
        connection.close()


def main() -> None:
    """What the process does."""
    job = Job(**json.loads(Path(sys.argv[1]).read_bytes()))
    loop = _Loop(job)
    threads = [threading.Thread(target=loop.ask_until_over) for _ in range(job.connections)]
    cpu_started = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = sorted(loop.taken_ms)

    def percentile(share: float) -> float | None:
        return round(taken[min(int(share * len(taken)), len(taken) - 1)], 2) if taken else None

    figures = {
        "per_s": round(len(taken) / job.seconds, 2),
        "p50_ms": percentile(0.5),
        "p99_ms": percentile(0.99),
        "answers": len(taken),
        "failures": loop.failures,
        "generator_busy": round((time.process_time() - cpu_started) / (job.warm_up_s + job.seconds), 2),
        **({"taken_ms": [round(each, 2) for each in taken]} if job.tells_each else {}),
    }
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main()
